//! Prints the CUDA text of row kernels and elementwise kernels, for reading and for experiments.
//!
//! `cargo run --release -p tilewright-kernels --example show_rows -- softmax bf16 M=16384 N=8192` prints
//! one; sizes choose the schedule, and `key=value` pairs in lower case change it. With `--json FILE`, each
//! line of FILE is such a list, and the output is a JSON list of their kernels, in order, with what a launch needs.
//! Both understand the operations of [`build`]; `gpu/rows_peer.py` runs them beside PyTorch.

use std::collections::BTreeMap;
use std::fmt::Write;
use tilewright_base::DType;
use tilewright_device::{Arch, Program, Streams};
use tilewright_emit_cuda::{Argument, Source};
use tilewright_kernels::gemm::{GemmSpec, Order};
use tilewright_kernels::map::{AdamWSpec, AdamWTableSpec, DropoutSpec, MapSpec};
use tilewright_kernels::reduce::{ClipSpec, Over, ReduceSpec};
use tilewright_kernels::rows::{
    CrossEntropyForm, CrossEntropySpec, GemvForm, GemvSpec, NormBackwardSpec, RowOp, RowSpec,
    TopKSpec,
};
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_tile::Kernel;

struct Shown {
    program: Program,
    source: Source,
    schedule: String,
    items: i64,
    sizes: BTreeMap<String, i64>,
}

fn build(args: &[String]) -> Result<Vec<Shown>, String> {
    let [op, dtype, ..] = args else { return Err("name and type expected".into()) };
    let dtype: DType = dtype.parse().map_err(|_| format!("{dtype} is not a type"))?;
    let mut sizes: BTreeMap<String, i64> = BTreeMap::new();
    let mut keys: BTreeMap<String, String> = BTreeMap::new();
    for arg in &args[2..] {
        let (key, value) = arg.split_once('=').ok_or(format!("{arg} is not key=value"))?;
        match value.parse() {
            Ok(v) if key.starts_with(char::is_uppercase) || key.starts_with("ld") => {
                sizes.insert(key.into(), v);
            }
            _ => {
                keys.insert(key.into(), value.into());
            }
        }
    }
    let n = sizes.get("N").copied().unwrap_or(1);
    for ld in ["ldx", "ldy", "ld0", "ld1", "ld"] {
        sizes.entry(ld.into()).or_insert(n);
    }
    if op == "sumall" {
        sizes.insert("N".into(), n * sizes.get("M").copied().unwrap_or(1));
    }
    let given = sizes.clone();
    let size = |name: &str| given.get(name).copied();
    let number = |key: &str| -> Result<Option<u32>, String> {
        keys.get(key).map(|v| v.parse::<u32>().map_err(|e| format!("{key}={v}: {e}"))).transpose()
    };
    let to: DType = match keys.get("to") {
        Some(t) => t.parse().map_err(|_| format!("{t} is not a type"))?,
        None => dtype,
    };
    let arch = match keys.get("arch").map(String::as_str) {
        Some("sm80") => Arch::Sm80,
        Some("sm89") => Arch::Sm89,
        _ => Arch::Sm90a,
    };
    let residual = number("residual")? == Some(1);
    let pieces = number("pieces")? == Some(1);
    let row = |op| {
        let spec = RowSpec { op, dtype, residual };
        if number("whole").ok().flatten() == Some(1) {
            let kernel = spec.program("kernel", true);
            let schedule = GpuSchedule::lines_for(&kernel, arch, &size)?;
            return Ok((kernel, schedule.ok_or_else(|| tilewright_base::Error::bug("too long"))?));
        }
        if !pieces {
            return spec.kernel("kernel", arch, &size);
        }
        let kernel = spec.program("kernel", false);
        let schedule = GpuSchedule::lines_for(&kernel, arch, &size)?;
        Ok((kernel, schedule.ok_or_else(|| tilewright_base::Error::bug("no schedule"))?))
    };
    let map = |spec: MapSpec| spec.kernel("kernel", arch, &size);
    let one = |built: tilewright_base::Result<(Kernel, GpuSchedule)>| built.map(|b| vec![b]);
    let row = |op| one(row(op));
    let map = |spec| one(map(spec));
    let mut reduce = |over| {
        let plan = ReduceSpec::sum(over, dtype).plan(arch, &size)?;
        let tile = |key: &str| {
            let own = plan.parts.1.tiles.get(key).copied().unwrap_or(1);
            number(&key.to_lowercase()).ok().flatten().map_or(own, i64::from)
        };
        let parts = number("parts").ok().flatten().map_or(plan.parts_count, i64::from);
        let all = match over {
            Over::All => sizes["N"].unsigned_abs().div_ceil(tile("BN") as u64) as i64,
            Over::Rows => sizes["M"].unsigned_abs().div_ceil(tile("BM") as u64) as i64,
        };
        let turns = (all + parts - 1) / parts;
        sizes.insert("P".into(), (all + turns - 1) / turns);
        sizes.insert("C".into(), turns);
        Ok(std::iter::once(plan.parts).chain(plan.finish).collect())
    };
    let kernels = match op.as_str() {
        "softmax" => row(RowOp::Softmax),
        "logsoftmax" => row(RowOp::LogSoftmax),
        "layernorm" => row(RowOp::LayerNorm { eps: 1e-5 }),
        "rmsnorm" => row(RowOp::RmsNorm { eps: 1e-6 }),
        "copy" => map(MapSpec::copy(dtype, to)),
        "transpose" => map(MapSpec { transposed: true, ..MapSpec::copy(dtype, to) }),
        "pad" => map(MapSpec::pad(dtype, to)),
        "padtranspose" => map(MapSpec { transposed: true, ..MapSpec::pad(dtype, to) }),
        "biasgelu" => map(MapSpec::bias_gelu(dtype)),
        "swiglu" => map(MapSpec::swiglu(dtype)),
        "fused" => map(MapSpec::scale_shift_relu_add(dtype)),
        "layernormbwd" | "rmsnormbwd" => {
            let op = match op.starts_with("layer") {
                true => RowOp::LayerNorm { eps: 1e-5 },
                false => RowOp::RmsNorm { eps: 1e-6 },
            };
            let plan = NormBackwardSpec { op, dtype, added: false }
                .plan(arch, &size)
                .map_err(|e| e.to_string())?;
            let bm = number("bm")?.map_or(plan.parts.1.tiles["BM"], i64::from);
            let parts = number("parts")?.map_or(plan.parts_count, i64::from);
            let all = (sizes["M"] + bm - 1) / bm;
            let turns = (all + parts - 1) / parts;
            sizes.insert("P".into(), (all + turns - 1) / turns);
            sizes.insert("C".into(), turns);
            Ok(vec![plan.parts, plan.finish])
        }
        "topk" => {
            let count = number("count")?.unwrap_or(8);
            let largest = number("smallest")? != Some(1);
            one(TopKSpec { dtype, count, largest }.kernel("kernel", arch, &size))
        }
        "dropout" => {
            sizes.insert("O".into(), 5);
            let spec = DropoutSpec { dtype, residual, drop: 0.25, seed: 0x1234_5678_9abc };
            one(spec.kernel("kernel", arch, &size))
        }
        "crossentropy" => {
            let form = match keys.get("form").map(String::as_str) {
                None | Some("inplace") => CrossEntropyForm::InPlace,
                Some("beside") => CrossEntropyForm::Beside,
                Some("losses") => CrossEntropyForm::Losses,
                Some(form) => return Err(format!("unknown form {form}")),
            };
            one(CrossEntropySpec::plain(dtype, form).kernel("kernel", arch, &size))
        }
        "adamw" => {
            let copy = (dtype != DType::F32).then_some(dtype);
            one(AdamWSpec { gradient: dtype, copy }.kernel("kernel", arch, &size))
        }
        "adamwtable" => {
            sizes.insert("N".into(), given["R"] * given["B"]);
            let all = sizes.clone();
            let size = |name: &str| all.get(name).copied();
            let plan =
                ClipSpec { dtype, most: 1.0 }.plan(arch, &size).map_err(|e| e.to_string())?;
            sizes.insert("P".into(), plan.parts_count);
            sizes.insert("C".into(), plan.pieces);
            let (mut parts, finish) = (plan.parts, plan.finish);
            let mut finish = finish.ok_or("a norm has two steps")?;
            for ((_, p), name) in parts.0.params.iter_mut().zip(["G", "PARTS"]) {
                p.name = name.into();
            }
            for ((_, p), name) in finish.0.params.iter_mut().zip(["PARTS", "Y", "S"]) {
                p.name = name.into();
            }
            let copy = (dtype != DType::F32).then_some(dtype);
            let spec = AdamWTableSpec { one: AdamWSpec { gradient: dtype, copy } };
            let step = spec.kernel("kernel", arch, &size).map_err(|e| e.to_string())?;
            Ok(vec![parts, finish, step])
        }
        "sumall" => reduce(Over::All),
        "sumrows" => reduce(Over::Rows),
        "gemv" => {
            let result = if dtype == DType::I8 { DType::I32 } else { to };
            let sum = if dtype == DType::I8 { DType::I32 } else { DType::F32 };
            let mut gemm = GemmSpec::plain(dtype, sum, result);
            if number("deep")? != Some(0) {
                gemm.b = Order::Col;
            }
            let line = size(if gemm.b == Order::Col { "K" } else { "N" }).unwrap_or(1);
            let widest = i64::from(128 / dtype.bits());
            let vector = if line % widest == 0 { widest } else { 1 };
            let spec = GemvSpec { gemm, vectors: number("vectors")?.unwrap_or(1).into() };
            let form = |key: &str, or: i64| Ok::<i64, String>(number(key)?.map_or(or, i64::from));
            let form = GemvForm {
                threads: form("threads", 256)?,
                lanes: form("lanes", 32)?,
                each: form("each", 4)?,
                runs: form("runs", 1)?,
                vector: form("vector", vector)?,
                splits: 1,
            };
            Ok(vec![(spec.program("kernel", false), spec.schedule(arch, &form))])
        }
        _ => return Err(format!("unknown operation {op}")),
    }
    .map_err(|e| e.to_string())?;
    let kernels_many = kernels.len() > 1 && !op.starts_with("adamw");
    let shown = |(i, (kernel, mut schedule)): (usize, (Kernel, GpuSchedule))| {
        // The second kernel of a gradient or of a sum adds up what the first one leaves: its knobs have names of their own.
        for key in keys.keys() {
            let Some(value) = number(key).ok().flatten() else { continue };
            let last = key.strip_prefix("last.");
            if (i > 0) != last.is_some() && kernels_many {
                continue;
            }
            match last.unwrap_or(key.as_str()) {
                name @ ("bm" | "bn" | "bp") => {
                    schedule.tiles.insert(name.to_uppercase().into(), value.into());
                }
                "threads" => schedule.lines.threads = value,
                "lanes" => schedule.lines.lanes = value,
                "vector" => schedule.lines.vector = value,
                "blocks" => schedule.blocks_per_sm = value,
                "early" => schedule.lines.early = value == 1,
                "kept" => schedule.lines.kept = value,
                "streams" => {
                    let all = [Streams::Cached, Streams::Past, Streams::Last];
                    schedule.lines.streams = all[value.min(2) as usize];
                }
                "ahead" => schedule.lines.fetched = value,
                "cluster" => schedule.cluster = value,
                "persistent" => schedule.persistent = value == 1,
                "residual" | "time" | "peer" | "pieces" | "count" | "smallest" | "whole" => {}
                "pin" if value == 0 => schedule.sizes.clear(),
                "pin" => {
                    schedule.sizes.insert("N".into(), sizes["N"]);
                }
                "deep" | "each" | "runs" | "vectors" | "parts" => {}
                _ => return Err(format!("unknown key {key}")),
            }
        }
        tilewright_tile::verify(&kernel).map_err(|e| e.to_string())?;
        let program = lower(&kernel, &schedule).map_err(|e| e.to_string())?;
        let source = tilewright_emit_cuda::emit(&program).map_err(|e| e.to_string())?;
        let size = |name: &str| sizes.get(name).copied();
        let items = program.items.eval_with(&size).ok_or("items without a value")?;
        let of_program =
            |s: &tilewright_layout::Symbol| size(&s.name).map(|v| (s.name.to_string(), v));
        let sizes = program.symbols.iter().filter_map(of_program).collect();
        Ok(Shown { program, source, schedule: schedule.lines_text(), items, sizes })
    };
    kernels.into_iter().enumerate().map(shown).collect()
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

fn json(shown: &Shown) -> String {
    let Shown { program, source, .. } = shown;
    let arguments: Vec<String> = source
        .arguments
        .iter()
        .map(|a| match a {
            Argument::Map(m) => format!("{{\"map\": {}}}", quoted(&program.maps[*m].name)),
            Argument::Pointer(p) => {
                format!("{{\"pointer\": {}}}", quoted(&program.params[*p].name))
            }
            Argument::Size(s) | Argument::Live(s) => format!("{{\"size\": {}}}", quoted(s)),
        })
        .collect();
    let sizes: Vec<String> =
        shown.sizes.iter().map(|(name, v)| format!("{}: {v}", quoted(name))).collect();
    format!(
        "{{\"schedule\": {}, \"entry\": {}, \"cluster\": {}, \"text\": {}, \"smem\": {}, \"threads\": {}, \"persistent\": {}, \"items\": {}, \"sizes\": {{{}}}, \"arguments\": [{}]}}",
        quoted(&shown.schedule),
        quoted(&source.entry),
        source.cluster,
        quoted(&source.text),
        source.smem_bytes,
        source.threads,
        program.persistent,
        shown.items,
        sizes.join(", "),
        arguments.join(", ")
    )
}

fn main() -> Result<(), String> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().map(String::as_str) != Some("--json") {
        for shown in build(&args)? {
            println!("// {}\n{}", shown.schedule, shown.source.text);
        }
        return Ok(());
    }
    let list = std::fs::read_to_string(&args[1]).map_err(|e| format!("{}: {e}", args[1]))?;
    let mut out = String::from("[");
    for line in list.lines().filter(|l| !l.trim().is_empty() && !l.starts_with('#')) {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        match build(&words) {
            Ok(shown) => {
                let kernels: Vec<String> = shown.iter().map(json).collect();
                let comma = if out.len() > 1 { ",\n" } else { "" };
                let (line, kernels) = (quoted(line), kernels.join(", "));
                let _ = write!(out, "{comma}{{\"line\": {line}, \"kernels\": [{kernels}]}}");
            }
            Err(error) => eprintln!("{line}: {error}"),
        }
    }
    println!("{out}]");
    Ok(())
}
