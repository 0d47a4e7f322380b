//! [`Gpu`]: a CUDA device as data: what the picker and the tuner read.

use serde::{Deserialize, Serialize};

/// A GPU as data. Counts come from the driver, rates were measured; the last group are the constants
/// of the time model of tensor-core kernels, fitted to measured times of pairs of product and
/// schedule (docs/src/facts.md; `cargo run --release -p tilewright-tune --example fit_model`).
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

/// Constants of the time model; clocks are those of a multiprocessor. See the kernels' `model.rs` for the
/// formula.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GpuModel {
    /// Sustained clock under tensor-core load, GHz.
    pub clock_ghz: f64,
    /// Tensor-core time over its ideal.
    pub tensor_factor: f64,
    /// Time of shared-memory traffic over its ideal of 128 bytes per clock.
    pub shared_factor: f64,
    /// Share of that time which filling a stage costs beside reading it.
    pub shared_write_share: f64,
    /// Clocks per step of the depth loop that no product hides.
    pub step_clocks: f64,
    /// Further clocks per step with a single consumer.
    pub lone_consumer_clocks: f64,
    /// Bytes per clock that one multiprocessor gets from the second-level cache when all ask.
    pub l2_bytes_per_clock: f64,
    /// Share of a multicast load that is saved.
    pub multicast_saving: f64,
    /// Clocks from a load to its data, divided among the stages of the ring.
    pub load_latency_clocks: f64,
    /// Share of load times that adds to a step even when products take longer.
    pub load_share: f64,
    /// Clocks of an epilogue, apart from its bytes.
    pub epilogue_clocks: f64,
    /// Bytes of result per clock of an epilogue.
    pub epilogue_bytes_per_clock: f64,
    /// Microseconds of a launch.
    pub launch_us: f64,
    /// Share of them that is left when the launch overlaps the kernel before.
    pub dependent_share: f64,
    /// Further microseconds with clusters.
    pub cluster_us: f64,
    /// Device memory in a product whose operands are cold, bytes per second.
    pub stream_bytes_per_s: f64,
    /// Microseconds until device memory streams.
    pub stream_start_us: f64,
    /// Bytes in flight from which on device memory streams at full rate.
    pub stream_bytes_in_flight: f64,
    /// Second-level cache traffic of an operand whose lines begin inside cache lines, over that of an aligned one.
    pub unaligned_factor: f64,
    /// Clocks per sector of 32 bytes that a store from registers touches.
    pub direct_sector_clocks: f64,
    /// Share of the time of what a wave of blocks reads from device memory that adds to the products.
    pub walk_share: f64,
    /// Time to stream operands into clusters, whose blocks wait for each other, over that into single blocks.
    pub cluster_memory_factor: f64,
    /// Share of a byte from device memory that a byte costs which is read again, from the cache.
    pub reread_share: f64,
    /// Share of the shorter of the two times, of the multiprocessors and of device memory, that adds to the longer.
    pub overlap_share: f64,
    /// Clusters of 1, 2 and 4 blocks that run at once.
    pub clusters_at_once: [u32; 3],
}

impl Gpu {
    /// A machine of this compute capability (times ten), for planning: one that was measured, or the nearest that is
    /// known from its data sheet.
    pub fn of_capability(capability: u32) -> Gpu {
        let known = match capability {
            90.. => Gpu::h200(),
            86.. => Gpu::rtx4090(),
            _ => Gpu::a100(),
        };
        Gpu { capability, ..known }
    }

    /// Shared memory that one block may use, in bytes, less a little for barriers (CUDA C++ Programming Guide, technical
    /// specifications per compute capability).
    pub fn smem_bytes_per_block(&self) -> i64 {
        let kib = match self.capability {
            80 | 87 => 163,
            90 | 100 | 103 => 227,
            _ => 99,
        };
        (kib << 10) - 256
    }

    /// NVIDIA A100 SXM with 80 GB. Counts and rates are those of its data sheet and of "NVIDIA A100 Tensor Core GPU
    /// Architecture" (2020): 312 TFLOPS of 16-bit products and 19.5 of f32 at 1.41 GHz, 2.04 TB/s. Nothing was measured; what no data
    /// sheet has is the H200's.
    pub fn a100() -> Gpu {
        let known = Gpu::h200();
        Gpu {
            name: "NVIDIA A100".into(),
            capability: 80,
            sms: 108,
            l2_bytes: 40 << 20,
            copy_bytes_per_s: 1.75e12,
            tensor_flops_per_clock: 2048.0,
            f32_flops_per_clock: 128.0,
            model: GpuModel {
                clock_ghz: 1.41,
                l2_bytes_per_clock: 40.0,
                load_latency_clocks: 900.0,
                stream_bytes_per_s: 1.75e12,
                clusters_at_once: [108, 0, 0],
                ..known.model
            },
        }
    }

    /// NVIDIA GeForce RTX 4090. Counts and rates are those of "NVIDIA Ada GPU Architecture" (2022): 165 TFLOPS of 16-bit products with f32
    /// sums and 82.6 of f32 at 2.52 GHz, 1.01 TB/s. Nothing was measured; what no data sheet has is the H200's.
    pub fn rtx4090() -> Gpu {
        let known = Gpu::h200();
        Gpu {
            name: "NVIDIA GeForce RTX 4090".into(),
            capability: 89,
            sms: 128,
            l2_bytes: 72 << 20,
            copy_bytes_per_s: 0.92e12,
            tensor_flops_per_clock: 512.0,
            f32_flops_per_clock: 256.0,
            model: GpuModel {
                clock_ghz: 2.52,
                l2_bytes_per_clock: 32.0,
                load_latency_clocks: 900.0,
                stream_bytes_per_s: 0.92e12,
                clusters_at_once: [128, 0, 0],
                ..known.model
            },
        }
    }

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
                clock_ghz: 1.75,
                tensor_factor: 1.085,
                shared_factor: 1.236,
                shared_write_share: 0.311,
                step_clocks: 3.3,
                lone_consumer_clocks: 14.6,
                l2_bytes_per_clock: 95.0,
                multicast_saving: 0.414,
                load_latency_clocks: 2519.0,
                load_share: 0.124,
                epilogue_clocks: 1286.0,
                epilogue_bytes_per_clock: 17.8,
                launch_us: 1.51,
                dependent_share: 0.35,
                cluster_us: 0.8,
                stream_bytes_per_s: 3.8e12,
                stream_start_us: 1.5,
                stream_bytes_in_flight: 4.19e6,
                unaligned_factor: 1.7,
                direct_sector_clocks: 7.5,
                walk_share: 0.021,
                cluster_memory_factor: 1.07,
                reread_share: 0.03,
                overlap_share: 0.067,
                clusters_at_once: [132, 66, 30],
            },
        }
    }
}
