//! Runs a device program on the CPU, and checks its synchronisation while it runs.
//!
//! Every instance of a role in every block of a cluster steps through its code, in an order that an
//! [`Order`] chooses; copies into shared memory end when it says so. What happened before what is known by
//! vector clocks (`clock.rs`), so that an access which only luck puts after another is an error whatever
//! the order. What the order does decide is which barrier phases are met, and whether the program ends: [`check`]
//! therefore runs several that are as unfair as can be.
//!
//! What is an error: two accesses of which nothing orders one after the other (shared and global memory; a
//! write between), plain accesses before those of the copy engine or the tensor cores to the same memory without a fence
//! by their thread (in global memory: at all), shared memory or registers read before they are written,
//! accumulators touched while a `wgmma` group is open, used by `wgmma` without its fence or by products of two shapes,
//! a barrier used before all know of its initialisation, more arrivals or bytes than a phase takes, a
//! wait that meets another pass of its ring, a phase that completes while warps may still look for the one before,
//! plain accesses that only an arrival in another block would order, tiles and slots outside of their buffers, blocks that may
//! be gone when another one touches their memory, operations left open at the end, and deadlock.
//!
//! What is taken for granted: the warps of an instance do what is one step for all of them side by side, but for what the
//! clocks tell apart (their memory accesses, their waits at mbarriers); a `wgmma` group that one warp has
//! waited for is complete for the four, and all of them had issued it (as CUTLASS does, whose consumers let go of a stage by
//! one thread). A wait for a computed parity is not compared with the pass that is meant.
//!
//! | file | what it holds |
//! |---|---|
//! | `clock.rs` | vector clocks, the threads of an instance, groups |
//! | `memory.rs` | accesses to memory and what conflicts |
//! | `machine.rs` | instances, blocks, barriers; the loop that runs a cluster |
//! | `step.rs` | control flow and everything that synchronises |
//! | `lines.rs` | steps of threads in lines |
//! | `values.rs` | steps that move and compute values |
//!
//! To add a step: an arm in `step.rs` or `values.rs`, and its mutations in `tests/device_mutations.rs`.

mod clock;
mod lines;
mod machine;
mod memory;
mod step;
mod tensor;
mod values;

use crate::Mode;
use machine::Machine;
use memory::Global;
use std::fmt;
use tilewright_base::{Error, Result, ResultExt};
use tilewright_device::Program;
use tilewright_layout::Env;
use tilewright_tile::ParamId;

/// In which order instances step, and when copies into shared memory end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Instances in a fixed order of precedence: one only steps when all before it wait.
    Fixed {
        /// The last role first.
        last_role_first: bool,
        /// The last block of the cluster first.
        last_block_first: bool,
        /// Every instance of one block stands before those of the next.
        blocks_apart: bool,
        /// Copies end only when nobody can step, instead of at once.
        late: bool,
    },
    /// Picked at random, in bursts; the same seed gives the same order.
    Random {
        /// The seed.
        seed: u64,
    },
}

impl fmt::Display for Order {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Order::Fixed { last_role_first, last_block_first, blocks_apart, late } => {
                let end = |last: &bool| if *last { "last" } else { "first" };
                let by = if *blocks_apart { "block by block, " } else { "" };
                let copies = if *late { "as late as possible" } else { "at once" };
                let (role, block) = (end(last_role_first), end(last_block_first));
                write!(f, "{by}{role} role and {block} block preferred, copies end {copies}")
            }
            Order::Random { seed } => write!(f, "random order {seed}"),
        }
    }
}

/// The orders that [`check`] runs: all of precedence, with copies early and late, and random ones.
pub fn orders() -> Vec<Order> {
    let mut orders = Vec::new();
    for bits in 0..16 {
        orders.push(Order::Fixed {
            last_role_first: bits & 1 != 0,
            late: bits & 2 != 0,
            last_block_first: bits & 4 != 0,
            blocks_apart: bits & 8 != 0,
        });
    }
    orders.extend((1..=4).map(|seed| Order::Random { seed }));
    orders
}

/// How to run a program.
#[derive(Clone, Debug)]
pub struct Options {
    /// Rounding of floats; as for tile programs.
    pub mode: Mode,
    /// Clusters in the grid; a program that is not persistent gets one per item whatever it says.
    pub clusters: u64,
    /// The order of steps.
    pub order: Order,
    /// Parameters that no earlier kernel writes: they may be read before the grid wait.
    pub constants: Vec<ParamId>,
}

impl Default for Options {
    fn default() -> Options {
        Options {
            mode: Mode::F64,
            clusters: 1,
            order: Order::Random { seed: 1 },
            constants: Vec::new(),
        }
    }
}

/// What a run did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Steps of all instances.
    pub steps: u64,
    /// Clusters that ran.
    pub clusters: u64,
}

/// What [`check`] ran, all of it without a violation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckReport {
    /// Runs.
    pub runs: u64,
    /// Steps of all runs.
    pub steps: u64,
}

/// Runs `program`, which is well-formed ([`tilewright_device::verify`]), with these sizes.
///
/// `buffers` has the bytes of each parameter in order, in its layout, as for
/// [`crate::tile::run`]. The first violation is the error, with the last steps before it.
pub fn run(
    program: &Program,
    sizes: &Env,
    buffers: &mut [Vec<u8>],
    options: &Options,
) -> Result<Report> {
    if buffers.len() != program.params.len() {
        let (have, name) = (buffers.len(), &program.name);
        return Err(Error::bug(format!("{have} buffers for device program {name}")));
    }
    run_with(program, sizes, Some(buffers), options)
}

fn run_with(
    program: &Program,
    sizes: &Env,
    mut buffers: Option<&mut [Vec<u8>]>,
    options: &Options,
) -> Result<Report> {
    let items = program.items.eval(sizes).ok_or_else(|| {
        Error::bug(format!("items `{}` of {} have no value", program.items, program.name))
    })?;
    let clusters =
        if program.persistent { options.clusters } else { u64::try_from(items).unwrap_or(0) };
    let mut global = Global::new(program.params.len());
    let mut report = Report { steps: 0, clusters };
    for cluster in 0..clusters {
        let mut machine = Machine::new(program, sizes, (cluster, clusters), options, &mut global)?;
        machine.buffers = buffers.as_deref_mut();
        machine.run()?;
        report.steps += machine.steps;
    }
    Ok(report)
}

/// Runs `program` without values, for each of these sizes and numbers of clusters, in all of the
/// [`orders`] that differ for it. The first violation is the error.
///
/// # Errors
/// Our bug, with the sizes, the order, and the last steps before the violation.
pub fn check(program: &Program, sizes: &[Env], clusters: &[u64]) -> Result<CheckReport> {
    check_with(program, sizes, clusters, &[])
}

/// As [`check`], with parameters that may be read before the grid wait.
///
/// # Errors
/// As [`check`].
pub fn check_with(
    program: &Program,
    sizes: &[Env],
    clusters: &[u64],
    constants: &[ParamId],
) -> Result<CheckReport> {
    let mut report = CheckReport::default();
    let orders = machine::that_differ(program, orders())?;
    for env in sizes {
        for &clusters in clusters {
            for &order in &orders {
                let options =
                    Options { clusters, order, constants: constants.to_vec(), mode: Mode::F64 };
                let ran = run_with(program, env, None, &options).context(|| {
                    let sizes: Vec<String> = env.iter().map(|(s, v)| format!("{s}={v}")).collect();
                    let (name, sizes) = (&program.name, sizes.join(" "));
                    format!("checking {name} with {sizes}, {clusters} clusters, {order}")
                })?;
                report.runs += 1;
                report.steps += ran.steps;
            }
        }
    }
    Ok(report)
}
