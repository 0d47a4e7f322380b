//! [`Chooser`]: a kernel of a plan and its sizes to device programs, best first.

use crate::{attention, product};
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{Error, Kind, Result};
use tilewright_device::{Arch, Program};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, lower};
use tilewright_plan::{Form, KernelId, Plan};
use tilewright_target::Gpu;
use tilewright_tile::{Block, Kernel, Stmt, TileOp};

/// Where an operand of a launch is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// In the memory of a parameter of the plan's kernel, `offset` bytes from its start.
    Param {
        /// Which.
        param: usize,
        /// Bytes from its start.
        offset: u64,
    },
    /// In the workspace that all kernels share.
    Workspace {
        /// First byte.
        offset: u64,
        /// Length.
        bytes: u64,
    },
}

/// One device program with its sizes and operands.
#[derive(Clone, Debug)]
pub struct Launch {
    /// The program.
    pub program: Arc<Program>,
    /// Its size symbols.
    pub sizes: Env,
    /// One per parameter of the program.
    pub operands: Vec<Source>,
    /// Its schedule, for people.
    pub schedule: String,
}

/// One way to run a kernel: launches in order.
#[derive(Clone, Debug, Default)]
pub struct Way {
    /// In order; none when there is nothing to compute.
    pub launches: Vec<Launch>,
    /// Bytes of workspace.
    pub workspace_bytes: u64,
    /// Estimated time, where a model gave one.
    pub estimate_us: f64,
}

/// What a kernel became for some sizes.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// Ways to run it, best first. None: it runs on the host.
    pub ways: Vec<Way>,
    /// Why there are not more.
    pub refused: Vec<String>,
}

/// What picks a schedule for a program without products: [`GpuSchedule::lines_for`] or one beside it.
type Picked = dyn Fn(&Kernel, Arch, &dyn Fn(&str) -> Option<i64>) -> Result<Option<GpuSchedule>>;

/// Picks schedules, and remembers what it picked.
#[derive(Debug)]
pub struct Chooser {
    gpu: Gpu,
    arch: Arch,
    /// How many candidates of the product library to keep.
    most: usize,
    known: BTreeMap<(KernelId, Vec<i64>), Arc<Choice>>,
}

impl Chooser {
    /// For a device.
    pub fn new(gpu: Gpu) -> Chooser {
        let arch = Arch::of_capability(gpu.capability);
        Chooser { gpu, arch, most: 3, known: BTreeMap::new() }
    }

    /// The device.
    pub fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// The ways to run a kernel of the plan with these values of its symbols.
    ///
    /// # Errors
    /// Our bug. What cannot run on the device is no error: the choice says why.
    pub fn choose(&mut self, plan: &Plan, id: KernelId, sizes: &[i64]) -> Result<Arc<Choice>> {
        let key = (id, sizes.to_vec());
        if let Some(known) = self.known.get(&key) {
            return Ok(known.clone());
        }
        let planned = &plan.kernels[id];
        let env: Env =
            planned.kernel.symbols.iter().zip(sizes).map(|(s, v)| (s.name.clone(), *v)).collect();
        let mut choice = Choice::default();
        let product = has_product(&planned.kernel.body);
        let all: Vec<usize> = (0..planned.kernel.params.len()).collect();
        if !product {
            // Long rows that stay on the multiprocessor between the loops over them.
            let kept = self.lines(&planned.kernel, &all, &env, &GpuSchedule::lines_kept);
            choice.ways.extend(kept.unwrap_or_default());
        }
        for form in &planned.forms {
            match form {
                Form::Product(product) => {
                    let ways = product::ways(product, &env, &self.gpu, self.most);
                    choice.add("as a matrix product", ways)?;
                }
                Form::Attention(attention) => {
                    let ways = attention::ways(attention, &env, &self.gpu, self.most);
                    choice.add("as attention", ways)?;
                }
                Form::Program { kernel, params } => {
                    let ways = self.lines(kernel, params, &env, &GpuSchedule::lines_for);
                    choice.add("with whole rows in registers", ways)?;
                }
            }
        }
        if product {
            if choice.ways.is_empty() {
                choice.refused.push("a product that is no product of matrices".to_string());
            }
        } else {
            let ways = self.lines(&planned.kernel, &all, &env, &GpuSchedule::lines_for);
            choice.add("as it is", ways)?;
        }
        let choice = Arc::new(choice);
        self.known.insert(key, choice.clone());
        Ok(choice)
    }

    /// A program without products, with a schedule from `pick`.
    fn lines(
        &self,
        kernel: &Kernel,
        params: &[usize],
        env: &Env,
        pick: &Picked,
    ) -> Result<Vec<Way>> {
        let mut kernel = kernel.clone();
        let mut sizes = env.clone();
        sizes.retain(|name, _| kernel.symbols.iter().any(|s| s.name == *name));
        // Plans bound their sizes by ranges of 64 bits; programs have 31.
        for symbol in &mut kernel.symbols {
            symbol.range.max = symbol.range.max.min(i64::from(i32::MAX));
        }
        let lookup = |name: &str| sizes.get(name).copied();
        let Some(schedule) = pick(&kernel, self.arch, &lookup)? else {
            return Err(Error::unsupported("the row takes more registers than a block has"));
        };
        let program = Arc::new(lower(&kernel, &schedule)?);
        let operands = params.iter().map(|&param| Source::Param { param, offset: 0 }).collect();
        let launch = Launch { program, sizes, operands, schedule: schedule.to_string() };
        Ok(vec![Way { launches: vec![launch], ..Way::default() }])
    }
}

impl Choice {
    /// Adds ways, or the reason why there are none. Bugs are errors.
    fn add(&mut self, how: &str, ways: Result<Vec<Way>>) -> Result<()> {
        match ways {
            Ok(ways) => self.ways.extend(ways),
            Err(e) if e.kind() == Kind::Bug => return Err(e),
            Err(e) => self.refused.push(format!("{how}: {}", e.message())),
        }
        Ok(())
    }

    /// Why it runs on the host.
    pub fn reason(&self) -> String {
        self.refused.join("; ")
    }
}

fn has_product(block: &Block) -> bool {
    block.stmts.iter().any(|stmt| match stmt {
        Stmt::Let(_, op) => matches!(op, TileOp::Mma { .. }),
        Stmt::For(f) => has_product(&f.body),
        Stmt::If(f) => has_product(&f.then) || has_product(&f.otherwise),
        _ => false,
    })
}
