//! Inputs for a model: made up, for verifying and timing.

use std::collections::BTreeMap;
use tilewright_base::{DType, Error, Result};
use tilewright_data::{Tensor, check_memory, element_count};
use tilewright_graph::{Graph, Op, ValueId};
use tilewright_interp::philox4x32_10;
use tilewright_layout::{Dim, Env};

/// Sizes for symbols that the user did not choose: 8 for the first dimension of an input, else 32,
/// moved into the symbol's range.
pub fn sizes(graph: &Graph, chosen: &BTreeMap<String, i64>) -> Result<Env> {
    let mut env = Env::new();
    for name in chosen.keys() {
        if !graph.symbols.iter().any(|s| &*s.name == name.as_str()) {
            let names: Vec<&str> = graph.symbols.iter().map(|s| &*s.name).collect();
            let hint = match names.is_empty() {
                true => "all its sizes are fixed".to_string(),
                false => format!("its free sizes are: {}", names.join(", ")),
            };
            return Err(Error::user(format!("the model has no size `{name}`")).with_hint(hint));
        }
    }
    for symbol in &graph.symbols {
        let leads = graph
            .inputs
            .iter()
            .any(|&v| graph.shape(v).first().and_then(Dim::as_symbol) == Some(&symbol.name));
        let value = match chosen.get(&*symbol.name) {
            Some(&value) if value < symbol.range.min || value > symbol.range.max => {
                return Err(Error::user(format!(
                    "size {} = {value} is outside the model's range {}..={}",
                    symbol.name, symbol.range.min, symbol.range.max
                )));
            }
            Some(&value) => value,
            None => (if leads { 1 } else { 32 }).clamp(symbol.range.min, symbol.range.max),
        };
        env.insert(symbol.name.clone(), value);
    }
    Ok(env)
}

/// Inputs for every input of the graph, a function of `seed` alone: floats are normal(0,1),
/// integers lie in the range that their readers index (a vocabulary, say), masks are ones.
pub fn random(graph: &Graph, chosen: &BTreeMap<String, i64>, seed: u64) -> Result<Vec<Tensor>> {
    let env = sizes(graph, chosen)?;
    graph
        .inputs
        .iter()
        .enumerate()
        .map(|(i, &v)| random_input(graph, v, &env, seed.wrapping_add((i as u64) << 32)))
        .collect()
}

fn random_input(graph: &Graph, v: ValueId, env: &Env, seed: u64) -> Result<Tensor> {
    let name = &graph.values[v].name;
    let ty = graph.ty(v);
    let shape = ty
        .shape
        .iter()
        .map(|d| d.eval(env).and_then(|x| usize::try_from(x).ok()))
        .collect::<Option<Vec<usize>>>()
        .ok_or_else(|| Error::user(format!("input `{name}`: a size is unknown or too large")))?;
    let count = element_count(&shape)?;
    // The numbers are made as 64-bit ones first.
    let bytes = ty.dtype.bytes_for(count).and_then(|b| b.checked_add(count.checked_mul(8)?));
    check_memory(bytes.unwrap_or(usize::MAX), &format!("input `{name}` of shape {shape:?}"))?;
    let mut words = Words { seed, next: 0, block: [0; 4] };
    if ty.dtype.is_float() {
        let values: Vec<f64> = (0..count).map(|_| words.normal()).collect();
        return Tensor::from_f64s(ty.dtype, &shape, &values);
    }
    let bound = match ty.dtype {
        _ if name.to_lowercase().contains("mask") => None,
        DType::Bool => Some(2),
        _ => Some(index_bound(graph, v).unwrap_or(2)),
    };
    let values: Vec<i64> = (0..count)
        .map(|_| bound.map_or(1, |b| (u64::from(words.word()) % b.max(1) as u64) as i64))
        .collect();
    Tensor::from_i64s(ty.dtype, &shape, &values)
}

/// The smallest extent that this integer input indexes, followed through elementwise maps and
/// views.
fn index_bound(graph: &Graph, v: ValueId) -> Option<i64> {
    let mut bound: Option<i64> = None;
    for (_, node) in graph.live() {
        for (i, &input) in node.inputs.iter().enumerate() {
            if input != v {
                continue;
            }
            let found = match &node.op {
                Op::Gather(axis) | Op::GatherElements(axis) if i == 1 => {
                    graph.shape(node.inputs[0]).get(*axis).and_then(Dim::as_const)
                }
                Op::Map(_) | Op::Reshape(_) | Op::Permute(_) | Op::Expand(_) | Op::Slice { .. } => {
                    index_bound(graph, node.outputs[0])
                }
                _ => None,
            };
            bound = match (bound, found) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
    }
    bound
}

/// Random words from Philox, four at a time.
struct Words {
    seed: u64,
    next: u64,
    block: [u32; 4],
}

impl Words {
    fn word(&mut self) -> u32 {
        if self.next.is_multiple_of(4) {
            let at = self.next / 4;
            let key = [self.seed as u32, (self.seed >> 32) as u32];
            self.block = philox4x32_10([at as u32, (at >> 32) as u32, 0, 0], key);
        }
        let word = self.block[(self.next % 4) as usize];
        self.next += 1;
        word
    }

    /// Box and Muller.
    fn normal(&mut self) -> f64 {
        let unit = |w: u32| (f64::from(w) + 0.5) / 4294967296.0;
        let (a, b) = (unit(self.word()), unit(self.word()));
        (-2.0 * a.ln()).sqrt() * (std::f64::consts::TAU * b).cos()
    }
}
