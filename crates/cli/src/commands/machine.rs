//! `tw machine`: this machine as data, its ceilings measured once and cached.

use crate::args::MachineArgs;
use crate::output::Output;
use std::fmt::Write as _;
use tilewright_base::{Error, Result};

pub(crate) fn run(args: &MachineArgs, output: &Output) -> Result<()> {
    let cache = tilewright::cache_dir();
    let cpu = tilewright::measured_cpu(args.threads, cache.as_deref(), args.measure)?;
    let mut text = String::new();
    let c = &cpu.ceilings;
    let giga = 1e-9;
    // Writing to a string cannot fail.
    let _ = write!(
        text,
        "{}\n  threads          {}\n  vector           {} bits\n  caches           L1 {} KiB, L2 {} KiB, L3 {} KiB\n  features         {}\n\
         measured ceilings\n  f32 multiply-add {:.0} GFLOP/s on 1 thread, {:.0} on {}\n  memory           {:.1} GB/s read, {:.1} GB/s copy\n  L3               {}\n  L2               {:.0} GB/s on 1 thread\n  kernel launch    {:.2} us, {:.1} us when threads sleep",
        cpu.name,
        cpu.threads,
        cpu.vector_bits,
        cpu.l1_bytes >> 10,
        cpu.l2_bytes >> 10,
        cpu.l3_bytes >> 10,
        cpu.features.join(" "),
        c.f32_flops_per_s_1_thread * giga,
        c.f32_flops_per_s * giga,
        cpu.threads,
        c.memory_read_bytes_per_s * giga,
        c.memory_copy_bytes_per_s * giga,
        match c.l3_read_bytes_per_s {
            rate if rate > 0.0 => format!("{:.0} GB/s on {}", rate * giga, cpu.threads),
            _ => "not measured (--measure)".to_string(),
        },
        c.l2_read_bytes_per_s * giga,
        c.launch_s * 1e6,
        c.wake_s * 1e6,
    );
    // Matrix instructions, as far as the processor has them.
    for (feature, name, unit, rate) in [
        ("avx512bf16", "bf16 AVX-512", "GFLOP/s", c.bf16_flops_per_s),
        ("avx512vnni", "int8 VNNI", "GOP/s", c.int8_ops_per_s),
        ("amx-bf16", "bf16 AMX", "GFLOP/s", c.amx_bf16_flops_per_s),
        ("amx-int8", "int8 AMX", "GOP/s", c.amx_int8_ops_per_s),
    ] {
        let _ = match rate {
            _ if !cpu.has(feature) => Ok(()),
            rate if rate > 0.0 => {
                write!(text, "\n  {name:<16} {:.0} {unit} on {}", rate * giga, cpu.threads)
            }
            _ => write!(text, "\n  {name:<16} present, not measured"),
        };
    }
    let value = serde_json::to_value(&cpu).map_err(|e| Error::bug(e.to_string()))?;
    output.result(&text, &value);
    Ok(())
}
