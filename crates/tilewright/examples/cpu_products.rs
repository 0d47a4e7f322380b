//! Writes the kernels of matrix products for a processor that need not be this one, to be compiled and timed where it is.
//!
//! `cargo run --release -p tilewright --example cpu_products -- FOLDER FEATURES TYPE:MxNxK ...`
//!
//! A product may end in `@NAME=SIZE,...`, tile sizes in place of the planner's (a depth that divides it, as theirs does).
//! FEATURES are LLVM's names, such as `avx512f,avx512bf16,amx-tile,amx-bf16,amx-int8`; TYPE is bf16, i8 (results i32) or f32.
//! Each product gets a file of LLVM IR, to be compiled for that processor, and a line in `kernels.json`: its function, blocks, scratch bytes, and the layout
//! of its packed weights.

use std::path::PathBuf;
use std::sync::Arc;
use tilewright_base::{DType, Error, Result};
use tilewright_data::Tensor;
use tilewright_emit_llvm::emit_kernel;
use tilewright_graph::{GraphBuilder, TensorType};
use tilewright_layout::{Dim, Env};
use tilewright_lower::{CpuTarget, Options, lower_with, matrix_units};
use tilewright_passes::{PassContext, choose_layouts};
use tilewright_plan::{HostCall, Step, Storage};

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, features, shapes @ ..] = args.as_slice() else {
        return Err(Error::user("FOLDER FEATURES TYPE:MxNxK ..."));
    };
    let folder = PathBuf::from(folder);
    let features: Vec<&str> = features.split(',').collect();
    let (bf16_unit, int8_unit) = matrix_units(512, |f| features.contains(&f));
    let target = CpuTarget { bf16_unit, int8_unit, ..CpuTarget::avx512() };
    let mut lines = Vec::new();
    for shape in shapes {
        let bad = || Error::user(format!("`{shape}` is not TYPE:MxNxK"));
        let (shape, tiles) = shape.split_once('@').unwrap_or((shape, ""));
        let (name, sizes) = shape.split_once(':').ok_or_else(bad)?;
        let dtype: DType = name.parse().map_err(|()| bad())?;
        let sizes: Vec<usize> = sizes.split('x').filter_map(|s| s.parse().ok()).collect();
        let [m, n, k] = sizes[..] else { return Err(bad()) };
        let mut b = GraphBuilder::new("product");
        let x = b.input("x", TensorType::new(dtype, vec![Dim::from(m), Dim::from(k)]));
        let w = b.constant("w", Tensor::zeros(dtype, [k, n])?);
        let y = b.op(
            tilewright_graph::Op::Contract {
                lhs: "mk".into(),
                rhs: "kn".into(),
                out: "mn".into(),
                acc: if dtype == DType::I8 { DType::I32 } else { DType::F32 },
                dtype: if dtype == DType::I8 { DType::I32 } else { dtype },
            },
            &[x, w],
        )?;
        b.output("y", y);
        let mut graph = b.finish();
        let context = PassContext { vector_lanes: 16, panel_width: 32, ..PassContext::default() };
        tilewright_passes::run(&mut graph, &context)?;
        let layouts = choose_layouts(&graph, &context);
        let host = |_: &_, _| HostCall {
            name: "none".into(),
            run: Arc::new(|_, _| Err(Error::unsupported("this example runs nothing"))),
        };
        let (plan, _) = lower_with(&graph, &target, &layouts, &host, &Options::default())?;
        let [Step::Launch { kernel, args, .. }] = plan.steps.as_slice() else {
            return Err(Error::unsupported("a product in several steps"));
        };
        let mut planned = plan.kernels[*kernel].clone();
        for pair in tiles.split(',').filter(|t| !t.is_empty()) {
            let (tile, size) = pair.split_once('=').ok_or_else(bad)?;
            let size = size.parse().map_err(|_| bad())?;
            *planned.schedule.tiles.get_mut(tile).ok_or_else(bad)? = size;
        }
        tilewright_tile::verify_schedule(&planned.kernel, &planned.schedule)?;
        let emitted = emit_kernel(&planned.kernel, &planned.schedule)?;
        let mut env = Env::new();
        env.extend(planned.schedule.tiles.iter().map(|(n, v)| (n.clone(), *v)));
        let blocks: i64 =
            planned.kernel.grid.iter().map(|g| g.extent.eval(&env).unwrap_or(0)).product();
        let more: String =
            tiles.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect();
        let id = format!("{name}_{m}_{n}_{k}_{more}");
        let symbol = format!("tw_{id}");
        let text = emitted.llvm_ir.replace(&format!("@{}", emitted.name), &format!("@{symbol}"));
        let path = folder.join(format!("{id}.ll"));
        std::fs::write(&path, text).map_err(|e| Error::user(format!("{}: {e}", path.display())))?;
        let buffers: Vec<_> = args.iter().map(|b| &plan.buffers[*b]).collect();
        let kinds: Vec<String> = buffers
            .iter()
            .map(|b| match b.storage {
                Storage::Const(_) => format!("w {}", b.layout),
                Storage::Input(_) => "x".into(),
                _ => "y".into(),
            })
            .collect();
        lines.push(serde_json::json!({
            "id": id, "symbol": symbol, "type": name, "m": m, "n": n, "k": k, "blocks": blocks,
            "scratch": emitted.scratch_bytes, "params": kinds, "schedule": planned.schedule.to_string(),
        }));
    }
    let path = folder.join("kernels.json");
    let text = serde_json::Value::Array(lines).to_string();
    std::fs::write(&path, text).map_err(|e| Error::user(format!("{}: {e}", path.display())))
}
