//! [`Gpu`]: a CUDA device as data: what the picker and the tuner read.

use serde::{Deserialize, Serialize};

/// A GPU as data. Counts come from the driver, rates were measured; the last group are the constants
/// of the time model of tensor-core kernels, fitted to measured times of about 2000 pairs of shape and
/// schedule (docs/src/facts.md).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Gpu {
    /// As the driver names it.
    pub name: String,
    /// Compute capability, times ten: 90.
    pub capability: u32,
    /// Multiprocessors.
    pub sms: u32,
    /// Second-level cache, bytes.
    pub l2_bytes: u64,
    /// Device memory read and written by a large copy, bytes per second.
    pub copy_bytes_per_s: f64,
    /// Dense tensor-core operations per clock and multiprocessor for 16-bit operands; 8-bit ones run at
    /// twice, TF32 at half of it.
    pub tensor_flops_per_clock: f64,
    /// Fused multiply-adds on f32, as operations per clock and multiprocessor.
    pub f32_flops_per_clock: f64,
    /// The time model.
    pub model: GpuModel,
}

/// Constants of the time model; clocks are those of a multiprocessor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuModel {
    /// Sustained clock under tensor-core load, GHz.
    pub clock_ghz: f64,
    /// Issue inefficiency of products.
    pub product_factor: f64,
    /// Clocks per step of the depth loop that no product hides.
    pub step_clocks: f64,
    /// Further clocks per step with a single consumer.
    pub lone_consumer_clocks: f64,
    /// Bytes per clock that one multiprocessor gets from the second-level cache.
    pub l2_bytes_per_clock: f64,
    /// Share of a multicast load that is saved.
    pub multicast_saving: f64,
    /// Clocks from a load to its data, divided among the stages of the ring.
    pub load_latency_clocks: f64,
    /// Clocks of an epilogue, apart from its bytes.
    pub epilogue_clocks: f64,
    /// Bytes of result per clock of an epilogue.
    pub epilogue_bytes_per_clock: f64,
    /// Microseconds of a launch.
    pub launch_us: f64,
    /// Further microseconds with clusters.
    pub cluster_us: f64,
    /// Device memory in a product whose operands are cold, bytes per second.
    pub stream_bytes_per_s: f64,
    /// Microseconds until device memory streams.
    pub stream_start_us: f64,
}

impl Gpu {
    /// NVIDIA H200 SXM at 700 W.
    pub fn h200() -> Gpu {
        Gpu {
            name: "NVIDIA H200".into(),
            capability: 90,
            sms: 132,
            l2_bytes: 60 << 20,
            copy_bytes_per_s: 4.27e12,
            tensor_flops_per_clock: 4096.0,
            f32_flops_per_clock: 256.0,
            model: GpuModel {
                clock_ghz: 1.959,
                product_factor: 1.216,
                step_clocks: 65.8,
                lone_consumer_clocks: 11.1,
                l2_bytes_per_clock: 39.7,
                multicast_saving: 0.933,
                load_latency_clocks: 2492.0,
                epilogue_clocks: 954.0,
                epilogue_bytes_per_clock: 12.2,
                launch_us: 0.995,
                cluster_us: 0.887,
                stream_bytes_per_s: 3.28e12,
                stream_start_us: 0.344,
            },
        }
    }
}
