//! [`Chooser`]: a kernel of a plan and its sizes to device programs, best first.

use crate::{attention, library, product};
use std::collections::BTreeMap;
use std::sync::Arc;
use tilewright_base::{Error, Kind, Result};
use tilewright_device::{Arch, Program};
use tilewright_layout::Env;
use tilewright_lower_gpu::{GpuSchedule, SPLIT_PARTS, SPLIT_PIECES, lower, split_reduction};
use tilewright_plan::{Form, KernelId, Library, Plan};
use tilewright_target::Gpu;
use tilewright_tile::{Access, Block, Kernel, Stmt, TileOp};

/// Bytes from which a reduction may be two kernels, parts that keep every multiprocessor busy, and blocks that are
/// enough without.
const SPLIT_BYTES: i64 = 1 << 20;
const MANY_PARTS: i64 = 528;
const ENOUGH_BLOCKS: i64 = 132;

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
    /// Calls of the library, which layers of a model have in common.
    calls: Vec<(Library, Env, Arc<Choice>)>,
}

impl Chooser {
    /// For a device.
    pub fn new(gpu: Gpu) -> Chooser {
        let arch = Arch::of_capability(gpu.capability);
        Chooser { gpu, arch, most: 3, known: BTreeMap::new(), calls: Vec::new() }
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
            // Few results of much data.
            choice.add("in parts", self.in_parts(&planned.kernel, &env))?;
            // Long rows that stay on the multiprocessor between the loops over them.
            let kept = self.lines(&planned.kernel, &all, &env, &GpuSchedule::lines_kept);
            let keeps = |way: &Way| way.launches.iter().any(|l| !l.program.shelves.is_empty());
            choice.ways.extend(kept.unwrap_or_default().into_iter().filter(keeps));
        }
        for form in &planned.forms {
            match form {
                Form::Product(product) => {
                    let ways = product::ways(product, &env, &self.gpu, self.most);
                    choice.add("as a matrix product", ways)?;
                }
                Form::Attention(attention) => {
                    let ways = attention::ways(attention, None, &env, &self.gpu, self.most);
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

    /// The ways to run a call of the library with these values of the plan's symbols.
    ///
    /// # Errors
    /// Our bug. What the library has no kernel for is no error: the choice says why.
    pub fn library(&mut self, call: &Library, env: &Env) -> Result<Arc<Choice>> {
        let known = self.calls.iter().find(|(c, e, _)| c == call && e == env);
        if let Some((_, _, choice)) = known {
            return Ok(choice.clone());
        }
        let mut choice = Choice::default();
        choice.add("in the library", library::ways(call, env, &self.gpu, self.most))?;
        let choice = Arc::new(choice);
        self.calls.push((call.clone(), env.clone(), choice.clone()));
        Ok(choice)
    }

    /// A reduction of more than [`SPLIT_BYTES`] whose blocks are too few for the device, as two kernels.
    fn in_parts(&self, kernel: &Kernel, env: &Env) -> Result<Vec<Way>> {
        let Some(split) = split_reduction(kernel) else { return Ok(vec![]) };
        let (parts, finish) = (&bounded(&split.parts), &bounded(&split.finish));
        let with = |parts: i64, pieces: i64| {
            let mut sizes = env.clone();
            sizes.insert(SPLIT_PARTS.into(), parts);
            sizes.insert(SPLIT_PIECES.into(), pieces);
            sizes
        };
        let bytes = |kernel: &Kernel, sizes: &Env, access: Access| -> i64 {
            let used = kernel.params.iter().filter(|(_, p)| p.access == access);
            let of = |p: &tilewright_tile::Param| {
                let elements = p.layout.alloc_elements().eval(sizes).unwrap_or(0);
                elements.saturating_mul(i64::from(p.dtype.bits())) / 8
            };
            used.map(|(_, p)| of(p)).sum()
        };
        if bytes(kernel, env, Access::In) < SPLIT_BYTES {
            return Ok(vec![]);
        }
        let pick = |kernel: &Kernel, sizes: &Env| {
            let picked =
                GpuSchedule::lines_for(kernel, self.arch, &|name| sizes.get(name).copied())?;
            Ok::<_, Error>(picked.map(GpuSchedule::behind_others))
        };
        // Scheduled as if there were many parts: one alone is no reason for a cluster.
        let Some(schedule) = pick(parts, &with(MANY_PARTS, 1))? else { return Ok(vec![]) };
        let one = with(1, 1);
        let number = |name: &str| {
            let tile = schedule.tiles.get(name).or_else(|| one.get(name));
            tile.copied()
        };
        let blocks =
            parts.grid.iter().map(|g| g.extent.eval_with(&number)).product::<Option<i64>>();
        let (Some(blocks), Some(all)) = (blocks, split.pieces.eval_with(&number)) else {
            return Ok(vec![]);
        };
        if blocks <= 0 || blocks >= ENOUGH_BLOCKS || all < 2 {
            return Ok(vec![]);
        }
        let up = |a: i64, b: i64| (a + b - 1) / b;
        let pieces = up(all, up(MANY_PARTS, blocks));
        let count = up(all, pieces);
        let sizes = with(count, pieces);
        let Some(last) = pick(finish, &sizes)? else { return Ok(vec![]) };
        let mut way = Way::default();
        let mut partial = Vec::new();
        for id in &split.partial {
            let p = &parts.params[*id];
            let elements = p.layout.alloc_elements().eval(&sizes).unwrap_or(0).max(1);
            let bytes = (elements as u64).saturating_mul(p.dtype.size() as u64);
            partial.push(Source::Workspace { offset: way.workspace_bytes, bytes });
            way.workspace_bytes += bytes.next_multiple_of(256);
        }
        for (kernel, schedule) in [(parts, schedule), (finish, last)] {
            let (program, text) = (lower(kernel, &schedule)?, schedule.to_string());
            let mut sizes = sizes.clone();
            sizes.retain(|name, _| kernel.symbols.iter().any(|s| s.name == *name));
            let own = kernel.params.len() - partial.len();
            let operands = (0..own)
                .map(|param| Source::Param { param, offset: 0 })
                .chain(partial.iter().cloned())
                .collect();
            way.launches.push(Launch {
                program: Arc::new(program),
                sizes,
                operands,
                schedule: text,
            });
        }
        Ok(vec![way])
    }

    /// A program without products, with a schedule from `pick`.
    fn lines(
        &self,
        kernel: &Kernel,
        params: &[usize],
        env: &Env,
        pick: &Picked,
    ) -> Result<Vec<Way>> {
        let kernel = bounded(kernel);
        let mut sizes = env.clone();
        sizes.retain(|name, _| kernel.symbols.iter().any(|s| s.name == *name));
        let lookup = |name: &str| sizes.get(name).copied();
        let Some(schedule) = pick(&kernel, self.arch, &lookup)? else {
            return Err(Error::unsupported("the row takes more registers than a block has"));
        };
        let schedule = schedule.behind_others();
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

/// The kernel with sizes of 31 bits, as programs have them; plans bound theirs by ranges of 64 bits.
fn bounded(kernel: &Kernel) -> Kernel {
    let mut kernel = kernel.clone();
    for symbol in &mut kernel.symbols {
        symbol.range.max = symbol.range.max.min(i64::from(i32::MAX));
    }
    kernel
}

fn has_product(block: &Block) -> bool {
    block.stmts.iter().any(|stmt| match stmt {
        Stmt::Let(_, op) => matches!(op, TileOp::Mma { .. }),
        Stmt::For(f) => has_product(&f.body),
        Stmt::If(f) => has_product(&f.then) || has_product(&f.otherwise),
        _ => false,
    })
}
