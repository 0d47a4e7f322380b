//! [`Direct`]: an operator of the pack, called without PyTorch's dispatcher where that would do nothing.
//!
//! A call is taken if all tensors are plain ones, nothing stands before the dispatcher or inside of it
//! ([`Interop::state`]), and the kernel takes the arguments as they lie. Every other call gives `None`, without having changed anything,
//! and the Python half asks the dispatcher, which also raises what there is to raise. Where a gradient is asked for, `apply` of the
//! operator's `torch.autograd.Function` is called.

use pyo3::prelude::*;
use pyo3::types::{PyBool, PyCapsule, PyDict, PyFloat, PyInt, PyString, PyTuple, PyType};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use tilewright_torch_ops::abi::{Abi, Arg, Interop, State, Tensor, Value};
use tilewright_torch_ops::{Kernel, kernel};

/// What calls without the dispatcher need of PyTorch.
struct Ways {
    interop: Interop,
    /// The types whose tensors are plain.
    plain: [Py<PyType>; 2],
    /// `Tensor.is_neg`: whether the numbers in memory are the negative ones.
    is_negative: Py<PyAny>,
    /// The names of `torch.autograd.forward_ad`: its level says whether forward derivatives are being taken.
    forward: Py<PyDict>,
    /// States of the dispatcher that change nothing for the pack.
    states: OnceLock<Vec<State>>,
}

static WAYS: OnceLock<Ways> = OnceLock::new();
/// Most arguments of an operator that is called so.
const MOST: usize = 10;

/// Prepares direct calls: the capsule `Tensor.__dlpack_c_exchange_api__`, the types of plain tensors, `Tensor.is_neg`, and the names of
/// `torch.autograd.forward_ad`. Whether they can be made; none is before [`direct_allow`].
#[pyfunction]
fn direct_open(
    capsule: &Bound<'_, PyCapsule>,
    plain: [Py<PyType>; 2],
    is_negative: Py<PyAny>,
    forward: Py<PyDict>,
) -> PyResult<bool> {
    let Ok(abi) = Abi::open() else { return Ok(false) };
    let Ok(table) = capsule.pointer_checked(Some(c"dlpack_exchange_api")) else {
        return Ok(false);
    };
    // SAFETY: a capsule of this name holds DLPack's table of functions.
    let Some(interop) = (unsafe { Interop::open(abi, table.as_ptr().cast_const()) }) else {
        return Ok(false);
    };
    let states = OnceLock::new();
    Ok(WAYS.set(Ways { interop, plain, is_negative, forward, states }).is_ok())
}

/// The state of the dispatcher in this thread; `None` where somebody stands before it, or nobody can know.
#[pyfunction]
fn direct_state() -> Option<State> {
    WAYS.get()?.interop.state()
}

/// Allows direct calls in these states of the dispatcher, in which it does nothing for the pack's operators.
#[pyfunction]
fn direct_allow(states: Vec<State>) {
    if let Some(ways) = WAYS.get() {
        let _ = ways.states.set(states);
    }
}

/// Arguments on their way to a kernel that runs without the interpreter's lock.
struct Sent<T>(T);

// SAFETY: PyTorch's tensors are counted atomically, and the thread stays the same.
unsafe impl<T> Send for Sent<T> {}

impl<T> Sent<T> {
    fn take(self) -> T {
        self.0
    }
}

/// An operator of the pack, called without the dispatcher.
#[pyclass(frozen, module = "tilewright._native")]
pub(crate) struct Direct {
    kernel: Kernel,
    /// How many of the results are given.
    kept: usize,
    /// So many of the first arguments must have one shape and type where a gradient is asked for: else they are converted first.
    alike: usize,
    apply: OnceLock<Py<PyAny>>,
}

type Given<'a, 'py> = [Option<&'a Bound<'py, PyAny>>; MOST];

#[pymethods]
impl Direct {
    /// `None` where there is no such operator, or none that can be called so. The first `kept` results are given; where a gradient is asked
    /// for, the first `alike` arguments must have one shape and type.
    #[staticmethod]
    fn of(name: &str, kept: Option<usize>, alike: usize) -> Option<Direct> {
        let kernel = kernel(name)?;
        let lists = kernel.args.iter().any(|(_, a)| *a == Arg::Tensors);
        let kept = kept.unwrap_or(usize::MAX);
        let apply = OnceLock::new();
        (!lists && kernel.args.len() <= MOST).then(|| Direct { kernel, kept, alike, apply })
    }

    /// Gives what is called where a gradient is asked for; its first `kept` results are given.
    fn differentiated(&self, apply: Py<PyAny>) {
        let _ = self.apply.set(apply);
    }

    /// The results, or `None` where the dispatcher has to be asked.
    #[pyo3(signature = (a=None, b=None, c=None, d=None, e=None, f=None, g=None, h=None, i=None, j=None, /))]
    #[allow(clippy::too_many_arguments, reason = "the operands of any operator")]
    fn call<'py>(
        &self,
        py: Python<'py>,
        a: Option<&Bound<'py, PyAny>>,
        b: Option<&Bound<'py, PyAny>>,
        c: Option<&Bound<'py, PyAny>>,
        d: Option<&Bound<'py, PyAny>>,
        e: Option<&Bound<'py, PyAny>>,
        f: Option<&Bound<'py, PyAny>>,
        g: Option<&Bound<'py, PyAny>>,
        h: Option<&Bound<'py, PyAny>>,
        i: Option<&Bound<'py, PyAny>>,
        j: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        self.called(py, &[a, b, c, d, e, f, g, h, i, j])
    }
}

impl Direct {
    fn called<'py>(
        &self,
        py: Python<'py>,
        given: &Given<'_, 'py>,
    ) -> PyResult<Option<Bound<'py, PyAny>>> {
        let Some(ways) = WAYS.get() else { return Ok(None) };
        let count = self.kernel.args.len();
        if given[count..].iter().any(Option::is_some) {
            return Ok(None);
        }
        let Some(state) = ways.interop.state() else { return Ok(None) };
        if !ways.states.get().is_some_and(|known| known.contains(&state)) {
            return Ok(None);
        }
        // A tensor with a tangent is a plain one, and the tangent would be lost.
        let level = ways.forward.bind(py).get_item(pyo3::intern!(py, "_current_level"))?;
        if !level.is_some_and(|level| level.extract::<i64>().is_ok_and(|level| level < 0)) {
            return Ok(None);
        }
        let given = &given[..count];
        if ways.interop.grad_enabled() && self.asked_for_gradients(py, given)? {
            let Some(apply) = self.apply.get() else { return Ok(None) };
            if !self.fits(ways, given)? {
                return Ok(None);
            }
            let none = py.None();
            let args = given.iter().map(|o| o.unwrap_or_else(|| none.bind(py)));
            let args: Vec<_> = args.collect();
            let results = apply.bind(py).call1(PyTuple::new(py, args)?)?;
            return self.part(results).map(Some);
        }
        let mut values = Vec::with_capacity(count);
        for ((_, kind), object) in self.kernel.args.iter().zip(given) {
            let Some(value) = taken(ways, *kind, *object)? else { return Ok(None) };
            values.push(value);
        }
        let (run, abi) = (self.kernel.run, ways.interop.abi());
        let sent = Sent(values);
        let outcome = py.detach(move || {
            let mut values = sent.take();
            Sent(catch_unwind(AssertUnwindSafe(|| run(abi, &mut values))))
        });
        let Ok(Ok(results)) = outcome.take() else { return Ok(None) };
        if let [Value::Tensor(only), ..] = &results[..]
            && (self.kept == 1 || results.len() == 1)
        {
            return Ok(object(py, ways, only));
        }
        let mut objects = Vec::with_capacity(results.len());
        for result in results.iter().take(self.kept) {
            let Value::Tensor(tensor) = result else { return Ok(None) };
            let Some(object) = object(py, ways, tensor) else { return Ok(None) };
            objects.push(object);
        }
        Ok(Some(PyTuple::new(py, objects)?.into_any()))
    }

    fn tensors<'a, 'py>(
        &self,
        given: &[Option<&'a Bound<'py, PyAny>>],
    ) -> impl Iterator<Item = &'a Bound<'py, PyAny>> {
        let kinds = self.kernel.args.iter().zip(given);
        kinds.filter(|((_, k), _)| matches!(k, Arg::Tensor | Arg::Optional)).filter_map(|(_, o)| *o)
    }

    /// Whether some argument asks for a gradient. What is no tensor does not.
    fn asked_for_gradients<'py>(
        &self,
        py: Python<'py>,
        given: &[Option<&Bound<'py, PyAny>>],
    ) -> PyResult<bool> {
        for object in self.tensors(given) {
            let Some(asks) = object.getattr_opt(pyo3::intern!(py, "requires_grad"))? else {
                continue;
            };
            if asks.is(PyBool::new(py, true)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether autograd's function can take the arguments as they are.
    fn fits(&self, ways: &Ways, given: &[Option<&Bound<'_, PyAny>>]) -> PyResult<bool> {
        let mut first = None;
        for object in self.tensors(given) {
            if !is_plain(ways, object) {
                return Ok(false);
            }
        }
        for object in self.tensors(given.get(..self.alike).unwrap_or(given)) {
            let Some(tensor) = seen(ways, object) else { return Ok(false) };
            let first = first.get_or_insert_with(|| tensor.alike());
            if *first != tensor.alike() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The first `kept` results of `apply`.
    fn part<'py>(&self, results: Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        let Ok(all) = results.cast::<PyTuple>() else { return Ok(results) };
        match self.kept {
            1 => all.get_item(0),
            kept if kept < all.len() => Ok(all.get_slice(0, kept).into_any()),
            _ => Ok(results),
        }
    }
}

/// A result as an object of Python.
fn object<'py>(py: Python<'py>, ways: &Ways, tensor: &Tensor) -> Option<Bound<'py, PyAny>> {
    // SAFETY: the interpreter's lock is held; the object is a new reference.
    unsafe { ways.interop.wrap(tensor).map(|o| Bound::from_owned_ptr(py, o.cast())) }
}

/// An argument as the kernel takes it; `None` where the dispatcher has to be asked.
fn taken(ways: &Ways, kind: Arg, object: Option<&Bound<'_, PyAny>>) -> PyResult<Option<Value>> {
    let Some(object) = object else {
        return Ok((kind == Arg::Optional).then_some(Value::None));
    };
    Ok(match kind {
        Arg::Tensor | Arg::Optional => {
            let negative = || ways.is_negative.bind(object.py()).call1((object,))?.is_truthy();
            if !is_plain(ways, object) || negative()? {
                return Ok(None);
            }
            seen(ways, object).map(Value::Tensor)
        }
        Arg::Float if object.is_exact_instance_of::<PyFloat>() => {
            Some(Value::Float(object.extract()?))
        }
        Arg::Int if object.is_exact_instance_of::<PyInt>() => object.extract().ok().map(Value::Int),
        Arg::Bool if object.is_exact_instance_of::<PyBool>() => {
            Some(Value::Bool(object.extract()?))
        }
        Arg::Str if object.is_exact_instance_of::<PyString>() => {
            Some(Value::Str(object.extract()?))
        }
        _ => None,
    })
}

/// Whether it is a tensor of PyTorch's own type.
fn is_plain(ways: &Ways, object: &Bound<'_, PyAny>) -> bool {
    let ty = object.get_type();
    ways.plain.iter().any(|plain| plain.as_ptr() == ty.as_ptr())
}

/// Where a plain tensor lies.
fn seen(ways: &Ways, object: &Bound<'_, PyAny>) -> Option<Tensor> {
    // SAFETY: a `torch.Tensor` (`is_plain`) that the caller holds until the call ends; the interpreter's lock is held.
    let seen = unsafe { ways.interop.view(object.as_ptr().cast()) };
    if seen.is_none() {
        // What the interface has to say about this tensor, the dispatcher will say better.
        let _ = PyErr::take(object.py());
    }
    seen
}

pub(crate) fn add(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<Direct>()?;
    module.add_function(wrap_pyfunction!(direct_open, module)?)?;
    module.add_function(wrap_pyfunction!(direct_state, module)?)?;
    module.add_function(wrap_pyfunction!(direct_allow, module)?)
}
