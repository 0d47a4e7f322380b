//! From the problem of a gradient to steps.
//!
//! ```text
//! BackwardProblem --backward_plan--> steps: rows, keys, queries (tile program, schedule, sizes, operands) + workspace
//! ```
//!
//! To run it: the forward kernel stores its log-sum-exp ([`Problem::lse`]); then, for each step in order, lower its kernel
//! under its schedule and launch it with the tensors that its operands name. The workspace needs no contents.

use crate::attention::backward::{BackwardMask, BackwardSpec, KeySums};
use crate::attention::problem::{Problem, Strides};
use crate::attention::steps::{
    Launch, SMEM_BYTES, Workspace, addressable, ceil, first_built, put_strides, sizes, tile,
};
use tilewright_base::{DType, Error, Result};
use tilewright_device::Arch;
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, StoreKind, lower};
use tilewright_target::Gpu;
use tilewright_tile::Kernel;

/// How the gradients lie, beside a [`Problem`].
#[derive(Clone, Debug, PartialEq)]
pub struct Gradients {
    /// Of the gradient of the result.
    pub o: Strides,
    /// Of the gradient of the queries.
    pub q: Strides,
    /// Of the gradient of the keys.
    pub k: Strides,
    /// Of the gradient of the values.
    pub v: Strides,
    /// Alignment of their addresses, in this order, in bytes.
    pub align: [i64; 4],
}

/// The gradient of one attention with its sizes: of queries, keys and values, from that of the result.
///
/// Reads queries, keys, values, the result, its gradient and the log-sum-exp of each row (f32, a dense
/// `[batch, heads, q_len]`, as the forward kernel stores it).
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardProblem {
    /// The attention; its `lse` and `result` (which is `dtype`) do not matter.
    pub forward: Problem,
    /// How the gradients lie.
    pub gradients: Gradients,
}

impl BackwardProblem {
    /// Gradients that lie as their tensors do.
    pub fn alike(forward: Problem) -> BackwardProblem {
        let gradients = Gradients {
            o: forward.o,
            q: forward.q,
            k: forward.k,
            v: forward.v,
            align: [forward.align[3], forward.align[0], forward.align[1], forward.align[2]],
        };
        BackwardProblem { forward, gradients }
    }

    /// What is computed, for every length.
    ///
    /// # Errors
    /// The user's for impossible sizes; unsupported: types of other than 16 bits, depths that are padded differently or above
    /// 256, a scale that is not above zero.
    pub fn spec(&self) -> Result<BackwardSpec> {
        let p = &self.forward;
        p.check()?;
        let g = &self.gradients;
        if [g.o, g.q, g.k, g.v]
            .iter()
            .flat_map(Strides::all)
            .any(|s| !(0..=i64::from(i32::MAX)).contains(&s))
        {
            return Err(Error::user(format!("strides {g:?}: 0 to 2^31 - 1 elements")));
        }
        let refuse = |what: &str| {
            Err(Error::unsupported(format!("the gradient of attention with {what} as one kernel")))
        };
        if !matches!(p.dtype, DType::BF16 | DType::F16) || p.result != p.dtype {
            return refuse("operands of other than 16 bits");
        }
        if p.scale <= 0.0 || !p.scale.is_finite() {
            return refuse("a scale that is not above zero");
        }
        let spec = BackwardSpec {
            dtype: p.dtype,
            depth: p.depth,
            width: p.width,
            causal: p.spec()?.causal,
            grouped: p.heads != p.kv_heads,
            scale: p.scale,
            mask: p.mask.map(|m| BackwardMask {
                kind: m.kind,
                dtype: m.dtype,
                by_row: m.strides.row != 0,
                by_head: m.strides.head != 0,
            }),
        };
        let (dk, dv) = spec.depths();
        if dk != dv || dk > DEPTH_MOST {
            return refuse(&format!("depths {} and {}", p.depth, p.width));
        }
        Ok(spec)
    }

    /// Whether the copy engine can address all tensors.
    fn addressable(&self) -> bool {
        let (p, g) = (&self.forward, &self.gradients);
        let strides = [&p.q, &p.k, &p.v, &g.o, &g.q, &g.k, &g.v];
        addressable(&strides, p.operand_bytes(), &[p.depth, p.width], &[p.align, g.align].concat())
    }
}

/// Beside wider sums, registers have no room for scores.
const DEPTH_MOST: i64 = 256;

/// Of wider keys and values, a program has room for the sums of one.
const BOTH_SUMS_MOST: i64 = 128;

/// Which tensor a parameter of a step is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackwardPlace {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// The result.
    O,
    /// Its gradient.
    DO,
    /// Log-sum-exp of each row.
    Lse,
    /// The mask.
    Mask,
    /// Gradient of the queries.
    DQ,
    /// Gradient of the keys.
    DK,
    /// Gradient of the values.
    DV,
    /// Part of the workspace.
    Workspace {
        /// First byte, a multiple of 256.
        offset: u64,
        /// Length.
        bytes: u64,
    },
}

/// One launch.
pub type BackwardStep = Launch<BackwardPlace>;

/// Launches in order.
#[derive(Clone, Debug)]
pub struct BackwardPlan {
    /// The launches.
    pub steps: Vec<BackwardStep>,
    /// Bytes of workspace.
    pub workspace_bytes: u64,
}

/// Schedules of the programs for keys and for queries, the ones to prefer for so many queries first.
pub fn backward_spaces(spec: &BackwardSpec, q_len: i64) -> [Vec<GpuSchedule>; 2] {
    let (dk, _) = spec.depths();
    let size = i64::from(spec.dtype.bits()) / 8;
    let chunk = [64, 32, 16].into_iter().find(|c| dk % c == 0).unwrap_or(16);
    let schedule = |consumers: i64, bq: i64, bt: i64, once: i64, turn: i64, stores: i64| {
        let rows = 64 * consumers;
        let staging = rows * chunk * size * stores;
        let stages = ((SMEM_BYTES - staging - once) / turn).min(4);
        (stages >= 2).then(|| {
            let mut s = GpuSchedule::hopper(&[("BQ", bq), ("BT", bt)]);
            s.consumers = consumers as u32;
            s.stages = stages as u32;
            s.raster = 1;
            s.dependent = true;
            s.store = StoreKind::Tma;
            s.store_slots = 1;
            s.serpentine = true;
            s
        })
    };
    // Beside a mask, what is loaded of it takes registers: fewer scores at a time.
    let masked = spec.mask.map_or(0, |m| if m.by_row { 24 } else { 8 });
    // Vectors take a unit of shared memory each.
    let rider = 2048;
    let (mut keys, mut queries) = (Vec::new(), Vec::new());
    for consumers in [2, 3, 1] {
        let rows = 64 * consumers;
        let budget = if consumers == 3 { 160 } else { 240 };
        for other in [128, 112, 96, 80, 64, 48, 32] {
            // Sums, scores and their gradient, 16-bit copies of both, and what addresses take.
            let sums = if dk > BOTH_SUMS_MOST { dk / 2 } else { dk };
            if sums + other + other / 2 + 16 + masked <= budget {
                let stage = other * 2 * dk * size + rider;
                keys.extend(schedule(consumers, other, rows, rows * 2 * dk * size, stage, 2));
            }
            if dk / 2 + other + other / 4 + 24 + masked <= budget {
                let stage = other * 2 * dk * size;
                queries.extend(schedule(consumers, rows, other, rows * 2 * dk * size, stage, 1));
            }
        }
    }
    prefer(&mut queries, dk, q_len);
    [keys, queries]
}

/// What was fastest on an H200 first: 64 keys at a time at depths above 64, and below with three consumers where there are many
/// queries.
fn prefer(queries: &mut [GpuSchedule], dk: i64, q_len: i64) {
    let consumers = if dk > 64 { 2 } else { 3 };
    if dk > 64 || q_len >= 2048 {
        queries.sort_by_key(|s| s.tiles.get("BT") != Some(&64) || s.consumers != consumers);
    }
}

/// The steps of a gradient on Hopper.
///
/// # Errors
/// The user's for impossible sizes; unsupported where no kernel fits: other than 16-bit types, depths above 256, tensors
/// that the copy engine cannot address, other devices.
pub fn backward_plan(problem: &BackwardProblem, gpu: &Gpu) -> Result<BackwardPlan> {
    let spec = problem.spec()?;
    let p = &problem.forward;
    let arch = Arch::of_capability(gpu.capability);
    if arch < Arch::Sm90a || !problem.addressable() || p.kv_len == 0 {
        return Err(Error::unsupported("the gradient of this attention as one kernel"));
    }
    if p.batch == 0 || p.heads == 0 || p.q_len == 0 {
        return Err(Error::unsupported("the gradient of attention without queries"));
    }
    let ld = (p.q_len + 3) / 4 * 4;
    let mut workspace = Workspace::default();
    let mut take = || {
        let (offset, bytes) = workspace.take(p.batch * p.heads * ld);
        BackwardPlace::Workspace { offset, bytes }
    };
    let (shift, delta) = (take(), take());
    let sizes = all_sizes(problem, ld);
    use BackwardPlace::{DK, DO, DQ, DV, K, Lse, Mask, O, Q, V};

    let rows = spec.rows_program("attention_backward_rows");
    let lookup = |name: &str| sizes.get(name).copied();
    let Some(lines) = GpuSchedule::lines_for(&rows, arch, &lookup)? else {
        return Err(Error::unsupported("rows too long for registers"));
    };
    let lines = GpuSchedule { dependent: true, ..lines };
    let [keys, queries] = backward_spaces(&spec, p.q_len);
    let first = |kernel: &Kernel, space: Vec<GpuSchedule>| -> Result<GpuSchedule> {
        let found = first_built(space, 1, |schedule| lower(kernel, &schedule).map(|_| schedule))?;
        let none = || format!("the gradient of attention of {} with depth {}", p.dtype, p.depth);
        found.into_iter().next().ok_or_else(|| Error::unsupported(none()))
    };
    let apart = spec.depths().0 > BOTH_SUMS_MOST;
    let keys_kernels = match apart {
        false => vec![spec.keys_program("attention_backward_keys", KeySums::Both)],
        true => vec![
            spec.keys_program("attention_backward_values", KeySums::Values),
            spec.keys_program("attention_backward_keys", KeySums::Keys),
        ],
    };
    let queries_kernel = spec.queries_program("attention_backward_queries");
    let queries = first(&queries_kernel, queries)?;
    let step = |kernel: Kernel, schedule, together: i64, operands: &[BackwardPlace]| {
        let mut sizes = sizes.clone();
        sizes.insert("hc".into(), together);
        Launch::new(kernel, schedule, &sizes, operands.to_vec())
    };
    let mask = p.mask.map(|_| Mask);
    let read = |all: &[BackwardPlace], write: &[BackwardPlace]| {
        all.iter().copied().chain(mask).chain(write.iter().copied()).collect::<Vec<_>>()
    };
    let mut steps = vec![step(rows, lines, 1, &[O, DO, Lse, shift, delta])];
    for kernel in keys_kernels {
        let schedule = first(&kernel, keys.clone())?;
        let operands = match (apart, &*kernel.name) {
            (false, _) => read(&[Q, K, V, DO, shift, delta], &[DK, DV]),
            (true, "attention_backward_values") => read(&[Q, K, DO, shift], &[DV]),
            (true, _) => read(&[Q, K, V, DO, shift, delta], &[DK]),
        };
        let together = keys_together(p, gpu, &schedule);
        steps.push(step(kernel, schedule, together, &operands));
    }
    let together = queries_together(p, gpu, &queries);
    let operands = read(&[Q, K, V, DO, shift, delta], &[DQ]);
    steps.push(step(queries_kernel, queries, together, &operands));
    Ok(BackwardPlan { steps, workspace_bytes: workspace.bytes })
}

/// How many heads of keys the blocks of keys walk together.
fn keys_together(p: &Problem, gpu: &Gpu, s: &GpuSchedule) -> i64 {
    let (bq, bt) = (tile(s, "BQ"), tile(s, "BT"));
    let blocks = ceil(p.q_len, bq);
    let turns = |block: i64| {
        let first = p.causal.map_or(0, |ahead| (block * bt - ahead).max(0) / bq);
        (blocks - first).max(0) * (p.heads / p.kv_heads)
    };
    let all: Vec<i64> = (0..ceil(p.kv_len, bt)).map(turns).collect();
    together(p.batch * p.kv_heads, &all, gpu.sms.into())
}

/// How many heads of queries the blocks of queries walk together.
fn queries_together(p: &Problem, gpu: &Gpu, s: &GpuSchedule) -> i64 {
    let (bq, bt) = (tile(s, "BQ"), tile(s, "BT"));
    let blocks = ceil(p.q_len, bq);
    let turns = |block: i64| match p.causal {
        // The last ones first.
        Some(ahead) => ((blocks - block) * bq + ahead).clamp(0, p.kv_len).div_euclid(bt) + 1,
        None => p.kv_len / bt + 1,
    };
    let all: Vec<i64> = (0..blocks).map(turns).collect();
    together(p.batch * p.heads, &all, gpu.sms.into())
}

/// Turns that an item costs besides its own.
const ITEM_TURNS: i64 = 3;

/// The fewest heads with which the busiest multiprocessor has about as little to do as with any number: fewer heads at a time
/// find more of their operands in the cache. `turns` has those of each block of a head.
fn together(heads: i64, turns: &[i64], sms: i64) -> i64 {
    let blocks = turns.len() as i64;
    let busiest = |each: i64| -> i64 {
        let mut load = vec![0i64; sms.max(1).unsigned_abs() as usize];
        for item in 0..heads * blocks {
            let block = item / each % blocks;
            // Every other round goes backwards, as the schedule says.
            let (round, at) = (item / sms, item % sms);
            let sm = if round % 2 == 0 { at } else { sms - 1 - at };
            load[sm as usize] += turns[block as usize] + ITEM_TURNS;
        }
        load.into_iter().max().unwrap_or(0)
    };
    let even = turns.iter().all(|t| *t == turns[0]);
    if even || heads * blocks > ITEMS_MOST {
        return 1;
    }
    let choices: Vec<(i64, i64)> =
        (1..=heads).filter(|n| heads % n == 0).map(|n| (n, busiest(n))).collect();
    let least = choices.iter().map(|c| c.1).min().unwrap_or(0);
    let near = choices.iter().find(|c| c.1 <= least + least / 32);
    near.map_or(1, |c| c.0)
}

/// With more items than this, any order is even.
const ITEMS_MOST: i64 = 1 << 14;

fn all_sizes(problem: &BackwardProblem, ld: i64) -> Env {
    let g = &problem.gradients;
    let mut env = sizes(&problem.forward);
    env.insert("ld".into(), ld);
    put_strides(&mut env, &[('u', &g.o), ('x', &g.q), ('y', &g.k), ('z', &g.v)]);
    env
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_walked_together_where_few_items_differ() {
        // 8 heads of 64 blocks in less than four rounds: the longest blocks of all heads come first.
        let causal: Vec<i64> = (0..64).map(|block| 4 * (128 - 2 * block)).collect();
        assert_eq!(together(8, &causal, 132), 8);
        // In many rounds they even out, and all alike need no order.
        let causal: Vec<i64> = (0..32).map(|block| 64 - 2 * block).collect();
        assert_eq!(together(64, &causal, 132), 1);
        assert_eq!(together(8, &[512; 64], 132), 1);
    }
}
