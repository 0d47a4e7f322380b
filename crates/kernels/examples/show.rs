//! Prints the CUDA text of a matrix product under a schedule, for reading and for compiling by hand.
//!
//! `cargo run --release -p tilewright-kernels --example show -- bf16 BM BN BK [key=value ...]`

use tilewright_base::DType;
use tilewright_kernels::gemm::{GemmSpec, Order};
use tilewright_lower_gpu::{GpuSchedule, Mode, StoreKind, lower};

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let dtype: DType = args[0].parse().expect("a data type");
    let sizes: Vec<i64> = args[1..4].iter().map(|a| a.parse().expect("a size")).collect();
    let (sum, result) = match dtype {
        DType::I8 => (DType::I32, DType::I32),
        DType::F8E4M3 => (DType::F32, DType::BF16),
        other => (DType::F32, other),
    };
    let mut spec = GemmSpec::plain(dtype, sum, result);
    let mut s = GpuSchedule::hopper(&[("BM", sizes[0]), ("BN", sizes[1]), ("BK", sizes[2])]);
    for arg in &args[4..] {
        let (key, value) = arg.split_once('=').expect("key=value");
        let number = || value.parse::<u32>().expect("a number");
        match key {
            "consumers" => s.consumers = number(),
            "stages" => s.stages = number(),
            "cluster" => s.cluster = number(),
            "axis" => s.cluster_axis = number() as usize,
            "raster" => s.raster = number(),
            "slots" => s.store_slots = number(),
            "vector" => s.vector = number(),
            "pingpong" => s.mode = if number() == 1 { Mode::PingPong } else { Mode::Cooperative },
            "direct" => s.store = if number() == 1 { StoreKind::Direct } else { StoreKind::Tma },
            "order" => {
                let order = |c: u8| if c == b'c' { Order::Col } else { Order::Row };
                let v = value.as_bytes();
                (spec.a, spec.b, spec.c) = (order(v[0]), order(v[1]), order(v[2]));
            }
            "batched" => spec.batched = number() == 1,
            _ => panic!("unknown key {key}"),
        }
    }
    let kernel = spec.program("gemm");
    let program = lower(&kernel, &s).unwrap_or_else(|e| panic!("{e}"));
    let source = tilewright_emit_cuda::emit(&program).unwrap_or_else(|e| panic!("{e}"));
    println!("{}", source.text);
    eprintln!("shared memory {} bytes, {:?}", source.smem_bytes, source.arguments);
}
