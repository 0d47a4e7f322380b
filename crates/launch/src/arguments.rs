//! What a launch passes, worked out without a device: sizes, addresses, tensor maps.
//!
//! A tensor map lists its dimensions as the emitter's `coordinates` does: the contiguous axis of the
//! parameter first, then the others from the last to the first.

use tilewright_base::{Error, Result};
use tilewright_cuda::{L2Promotion, MapElement, OobFill, Swizzle, TensorMapSpec, WindowBox};
use tilewright_device::{self as device, Program, TensorMap, Windows, is_live};
use tilewright_emit_cuda::Argument;
use tilewright_layout::{Dim, Env};
use tilewright_tile::{Access, Param};

/// Where a tensor lies on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Operand {
    /// Of the first byte; the parameter's layout counts from here.
    pub address: u64,
    /// How many bytes may be touched from there on.
    pub bytes: u64,
}

/// One argument.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// To be encoded for the device.
    Map(TensorMapSpec),
    /// The address from which a tensor's layout counts.
    Pointer(u64),
    /// A size.
    Size(i32),
}

/// What a launch passes, and how much work there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Arguments {
    /// In the order of the kernel's parameters.
    pub values: Vec<Value>,
    /// Work items; none means that there is nothing to launch.
    pub items: u64,
}

/// A parameter with its sizes put in.
struct Concrete<'a> {
    param: &'a Param,
    extents: Vec<u64>,
    /// In elements.
    strides: Vec<i64>,
    address: u64,
}

/// Works out the arguments of a program for these sizes and operands: one per parameter, in order, and then one of
/// four bytes for each size that is read from memory ([`tilewright_device::LIVE`]). `sizes` has values for those,
/// too, by which ranges and lengths are checked.
///
/// # Errors
/// A bug when sizes or operands do not fit the program; unsupported, in words, when the copy engine
/// cannot address a tensor as it lies.
pub fn arguments(
    program: &Program,
    order: &[Argument],
    sizes: &Env,
    operands: &[Operand],
) -> Result<Arguments> {
    let wrong =
        |message: String| Error::bug(message).with_context(format!("binding {}", program.name));
    for symbol in &program.symbols {
        let Some(value) = sizes.get(&symbol.name) else {
            return Err(wrong(format!("no value for the size {}", symbol.name)));
        };
        if *value < 0 || i32::try_from(*value).is_err() {
            return Err(wrong(format!("size {} is {value}, and a size has 31 bits", symbol.name)));
        }
    }
    let live: Vec<&str> =
        program.symbols.iter().map(|s| &*s.name).filter(|name| is_live(name)).collect();
    let wanted = program.params.len() + live.len();
    if operands.len() != wanted {
        let given = operands.len();
        return Err(wrong(format!("{given} operands for {wanted} tensors")));
    }
    let tensors: Vec<Concrete<'_>> = program
        .params
        .iter()
        .zip(operands)
        .map(|((_, param), operand)| concrete(param, sizes, *operand).map_err(wrong))
        .collect::<Result<_>>()?;
    // Maps have no empty dimensions, and where nothing is written there is nothing to do, whatever
    // range the kernel has been made for. One that also writes sums of nothing has those to write.
    let mut written = tensors.iter().filter(|t| t.param.access != Access::In);
    if written.all(|t| t.extents.contains(&0)) {
        return Ok(Arguments { values: Vec::new(), items: 0 });
    }
    // Kernels count along each axis with 31 bits; together the axes may have more.
    for tensor in &tensors {
        if let Some(extent) = tensor.extents.iter().find(|e| i32::try_from(**e).is_err()) {
            let name = &tensor.param.name;
            let message =
                format!("{name} has {extent} elements along one axis, more than 2^31 - 1");
            return Err(
                Error::unsupported(message).with_context(format!("binding {}", program.name))
            );
        }
    }
    for symbol in &program.symbols {
        let value = sizes.get(&symbol.name).copied().unwrap_or_default();
        let range = symbol.range;
        if !(range.min..=range.max).contains(&value) {
            return Err(wrong(format!(
                "size {} is {value}, and the kernel takes {} to {}",
                symbol.name, range.min, range.max
            )));
        }
    }
    let items = value(&program.items, sizes)
        .and_then(|items| u64::try_from(items).map_err(|_| format!("{items} items of work")))
        .map_err(wrong)?;
    if items == 0 {
        return Ok(Arguments { values: Vec::new(), items });
    }
    let size = |name: &str| sizes.get(name).copied().unwrap_or_default() as i32;
    let values = order
        .iter()
        .map(|argument| match argument {
            Argument::Map(id) => {
                let map = &program.maps[*id];
                let tensor = &tensors[map.param.index()];
                let made = match &map.windows {
                    Some(w) => window_spec(map, w, tensor, sizes),
                    None => spec(map, tensor),
                };
                made.map(Value::Map).map_err(|message| {
                    Error::unsupported(message)
                        .with_context(format!("binding {}", program.name))
                        .with_hint("a schedule with plain loads and stores has no such limits")
                })
            }
            // The text adds the offset of the layout itself.
            Argument::Pointer(id) => Ok(Value::Pointer(operands[id.index()].address)),
            Argument::Size(name) => Ok(Value::Size(size(name))),
            Argument::Live(name) => {
                let at = live.iter().position(|l| l == name);
                let operand = at.and_then(|at| operands.get(program.params.len() + at));
                match operand {
                    Some(o) if o.bytes >= 4 && o.address.is_multiple_of(4) => {
                        Ok(Value::Pointer(o.address))
                    }
                    _ => Err(wrong(format!("size {name} has no memory of its own"))),
                }
            }
        })
        .collect::<Result<_>>()?;
    Ok(Arguments { values, items })
}

fn value(dim: &Dim, sizes: &Env) -> std::result::Result<i64, String> {
    dim.eval(sizes).ok_or_else(|| format!("{dim} has no value for these sizes"))
}

/// Puts the sizes into a parameter's layout and checks that the operand is long enough.
fn concrete<'a>(
    param: &'a Param,
    sizes: &Env,
    operand: Operand,
) -> std::result::Result<Concrete<'a>, String> {
    let name = &param.name;
    if param.dtype.bits() < 8 {
        return Err(format!("{name}: elements of {} bits", param.dtype.bits()));
    }
    let element = param.dtype.size() as i128;
    let mut extents = Vec::new();
    let mut strides = Vec::new();
    let offset = i128::from(value(&param.layout.offset, sizes)?);
    let (mut first, mut last) = (offset, offset);
    for axis in &param.layout.axes {
        if axis.block.is_some() {
            return Err(format!("{name} has a blocked layout"));
        }
        let extent = value(&axis.extent, sizes)?;
        let stride = value(&axis.stride, sizes)?;
        let extent =
            u64::try_from(extent).map_err(|_| format!("{name} has an extent of {extent}"))?;
        let far = i128::from(extent.saturating_sub(1)) * i128::from(stride);
        if far < 0 {
            first += far
        } else {
            last += far
        }
        extents.push(extent);
        strides.push(stride);
    }
    let address = i128::from(operand.address) + offset * element;
    let tensor = Concrete { param, extents, strides, address: address as u64 };
    let empty = tensor.extents.contains(&0);
    if first < 0 && !empty {
        return Err(format!("{name} starts {} elements before its operand", -first));
    }
    let bytes = if empty { 0 } else { (last + 1) * element };
    if bytes > i128::from(operand.bytes) {
        return Err(format!("{name} takes {bytes} bytes, its operand has {}", operand.bytes));
    }
    if !tensor.address.is_multiple_of(element as u64) {
        return Err(format!("{name} is at {:#x}, which splits its elements", tensor.address));
    }
    Ok(tensor)
}

/// The map of a tensor, or why there is none.
fn spec(map: &TensorMap, tensor: &Concrete<'_>) -> std::result::Result<TensorMapSpec, String> {
    let name = &tensor.param.name;
    let element = tensor.param.dtype.size() as u64;
    let rank = tensor.extents.len();
    let contiguous = map.contiguous;
    if !(1..=5).contains(&rank) || contiguous >= rank || map.box_shape.len() != rank {
        return Err(format!("{name} has {rank} axes, and the copy engine takes 1 to 5"));
    }
    if tensor.extents[contiguous] > 1 && tensor.strides[contiguous] != 1 {
        let stride = tensor.strides[contiguous];
        return Err(format!(
            "axis {contiguous} of {name} has a stride of {stride} elements, not 1"
        ));
    }
    if !tensor.address.is_multiple_of(16) {
        return Err(format!(
            "{name} starts at {:#x}, and the copy engine wants a multiple of 16 bytes",
            tensor.address
        ));
    }
    let line_bytes = tensor.extents[contiguous] * element;
    if tensor.param.access != Access::In && !line_bytes.is_multiple_of(16) {
        return Err(format!(
            "lines of {name} have {line_bytes} bytes, and the copy engine writes whole units of 16"
        ));
    }
    let order: Vec<usize> = std::iter::once(contiguous)
        .chain((0..rank).rev().filter(|axis| *axis != contiguous))
        .collect();
    let mut strides_bytes = Vec::new();
    for &axis in &order[1..] {
        let stride = tensor.strides[axis];
        if stride < 0 && tensor.extents[axis] > 1 {
            return Err(format!(
                "axis {axis} of {name} runs backwards, and the copy engine does not"
            ));
        }
        let bytes = stride.unsigned_abs() * element;
        strides_bytes.push(if tensor.extents[axis] == 1 {
            // Never stepped along, so any legal distance will do.
            16
        } else if !bytes.is_multiple_of(16) {
            return Err(format!(
                "neighbours along axis {axis} of {name} are {bytes} bytes apart, and the copy engine wants a multiple of 16"
            ));
        } else {
            bytes
        });
    }
    let Some(of_type) = MapElement::of(tensor.param.dtype) else {
        return Err(format!("the copy engine has no elements of {}", tensor.param.dtype));
    };
    let spec = TensorMapSpec {
        element: if map.tf32 { MapElement::TF32 } else { of_type },
        address: tensor.address,
        sizes: order.iter().map(|axis| tensor.extents[*axis]).collect(),
        box_sizes: order.iter().map(|axis| map.box_shape[*axis]).collect(),
        element_strides: vec![1; rank],
        swizzle: match map.swizzle {
            device::Swizzle::None => Swizzle::None,
            device::Swizzle::B32 => Swizzle::B32,
            device::Swizzle::B64 => Swizzle::B64,
            device::Swizzle::B128 => Swizzle::B128,
        },
        // Fetching wider than lines are aligned reads what no box needs (1000 x 1000 bf16: 7% of the time).
        l2_promotion: match strides_bytes.iter().fold(256, |a: u64, b| gcd(a, *b)) {
            256 => L2Promotion::B256,
            128 => L2Promotion::B128,
            _ => L2Promotion::B64,
        },
        oob_fill: OobFill::Zero,
        windows: None,
        strides_bytes,
    };
    spec.problem().map_or(Ok(spec), |problem| Err(format!("{name}: {problem}")))
}

/// The map of windows over images. The tensor is the list of their pixels.
fn window_spec(
    map: &TensorMap,
    w: &Windows,
    tensor: &Concrete<'_>,
    sizes: &Env,
) -> std::result::Result<TensorMapSpec, String> {
    let name = &tensor.param.name;
    let two = |d: &[Dim; 2]| Ok::<_, String>([value(&d[0], sizes)?, value(&d[1], sizes)?]);
    let ([height, width], outputs) = (two(&w.size)?, two(&w.outputs)?);
    let image = height * width;
    let lines = tensor.extents[0] as i64;
    if image <= 0 || outputs.iter().any(|n| *n < 1) || lines % image != 0 {
        return Err(format!("{name}: {lines} pixels are no images of {height} x {width}"));
    }
    let plain = spec(&TensorMap { windows: None, ..map.clone() }, tensor)?;
    let line = plain.strides_bytes[0];
    let corner =
        |at: i64| i32::try_from(at).map_err(|_| format!("{name}: windows of {image} pixels"));
    let mut corners = [[0; 2]; 2];
    // The accelerator counts columns before rows.
    for (to, axis) in [(0, 1), (1, 0)] {
        let last = (outputs[axis] - 1) * w.steps[axis] - w.before[axis];
        corners[0][to] = corner(-w.before[axis])?;
        corners[1][to] = corner(last - ([height, width][axis] - 1))?;
    }
    let [lower, upper] = corners;
    let steps = w.steps.map(|s| s.clamp(0, 9) as u32);
    let spec = TensorMapSpec {
        sizes: vec![plain.sizes[0], width as u64, height as u64, (lines / image) as u64],
        strides_bytes: vec![line, line * width as u64, line * image as u64],
        box_sizes: vec![plain.box_sizes[0], plain.box_sizes[1], 1, 1],
        element_strides: vec![1, steps[1], steps[0], 1],
        windows: Some(WindowBox { lower, upper }),
        ..plain
    };
    spec.problem().map_or(Ok(spec), |problem| Err(format!("{name}: {problem}")))
}

fn gcd(a: u64, b: u64) -> u64 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests;
