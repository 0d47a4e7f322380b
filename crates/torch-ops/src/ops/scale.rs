//! A tensor times a number that lies on its device, in place: gradients that were computed before the gradient of the loss was known.

use crate::host::{self, Float, Number, with_number};
use crate::tensors::{float, same_device, wide};
use crate::written::{Set, Text, element, launch};
use tilewright_base::{Error, Result};
use tilewright_cuda::Args;
use tilewright_torch_abi::{Abi, Arg, Device, Operator, Tensor, Value};

/// `x = x * by`, `by` being one number in the wide type. Where it is 1, `x` is not touched.
pub(crate) struct Scale;

/// More blocks than this have nothing to do at once on any device.
const MOST_BLOCKS: u64 = 2048;

impl Operator for Scale {
    const NAME: &'static str = "scale_";
    const ARGS: &'static [(&'static str, Arg)] = &[("x", Arg::Written), ("by", Arg::Tensor)];
    const RETURNS: &'static str = "()";

    fn run(abi: &'static Abi, args: &mut [Value]) -> Result<Vec<Value>> {
        let [x, by] = args else { return Err(Error::bug("arguments")) };
        let (x, by) = (x.tensor()?, by.tensor()?);
        let dtype = float("x", &x)?;
        same_device("by", &by, &x)?;
        if by.elements() != 1 || by.dtype()? != wide(dtype) {
            let message = format!("by is {} of shape {:?}", by.dtype()?, by.sizes());
            return Err(Error::user(message).with_hint("it is one number of the wide type"));
        }
        if !host::is_dense(&x) || !x.address()?.is_multiple_of(16) {
            return Err(Error::unsupported("a tensor with gaps, or at an odd address"));
        }
        let elements = x.elements();
        if elements == 0 {
            return Ok(Vec::new());
        }
        if let Device::Cuda(index) = x.device() {
            let none = ("", 0);
            let set: Set = [element(dtype)?, none, none, none];
            let args = Args::new().value(x.address()?).value(by.address()?).value(elements);
            let blocks = elements.cast_unsigned().div_ceil(1024).min(MOST_BLOCKS);
            launch(abi, index, (Text::Scale, "scale", &set), blocks, 256, &args)?;
        } else {
            with_number!(dtype, on_host(&x, &by))?;
        }
        Ok(Vec::new())
    }
}

fn on_host<T: Number>(x: &Tensor, by: &Tensor) -> Result<()> {
    host::distinct([x].into_iter(), [by].into_iter())?;
    let by = host::read::<T::Wide>(by)?.first().copied().unwrap_or(T::Wide::of(1.0));
    if by.double() == 1.0 {
        return Ok(());
    }
    let x = host::write::<T>(x)?;
    host::wider(|| {
        for x in x {
            *x = T::narrow(x.wide() * by);
        }
    });
    Ok(())
}
