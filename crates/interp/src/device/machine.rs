//! One cluster at work: its instances, the state of its blocks, and who steps next.

use super::clock::{Clock, Groups, PARTS, Part, Threads, component};
use super::lines::Shelves;
use super::memory::{Access, Conflict, FragState, Global, Rect, SmemSlot};
use super::values::View;
use super::{Options, Order};
use crate::tile::Placed;
use crate::value::Buf;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use tilewright_base::{Error, Result};
use tilewright_device::*;
use tilewright_layout::{Dim, Env};

/// Steps after which a program counts as running forever.
const MOST_STEPS: u64 = 1 << 26;
/// Steps that a report shows.
const TRACE: usize = 12;

/// Which part of the program an instance is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stage {
    Setup,
    Body,
    Teardown,
    Done,
}

/// Who runs a block of steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Who {
    /// As the block around it.
    Same,
    /// The leader.
    Leader,
    /// Some of the threads.
    Some,
}

/// A block of steps being run.
#[derive(Debug)]
pub(super) struct Frame<'p> {
    pub(super) block: &'p [Stmt],
    pub(super) at: usize,
    pub(super) who: Who,
    /// Names bound when it began.
    pub(super) names: usize,
    /// The variable's next value, the end and the step of a loop.
    pub(super) again: Option<(i64, i64, i64)>,
}

/// An instance of a role in one block, or the warps between roles.
#[derive(Debug)]
pub(super) struct Agent<'p> {
    pub(super) block: usize,
    pub(super) name: String,
    pub(super) role: Option<&'p Role>,
    pub(super) first_thread: u32,
    pub(super) threads: u32,
    pub(super) stage: Stage,
    pub(super) frames: Vec<Frame<'p>>,
    pub(super) env: Vec<(Arc<str>, i64)>,
    /// Stages moved forward since the start.
    pub(super) rings: Vec<i64>,
    pub(super) frags: Vec<FragState>,
    pub(super) shelves: Shelves,
    pub(super) clocks: Threads,
    pub(super) stores: Groups,
    pub(super) wgmma: Groups,
    /// How often the threads had waited at mbarriers when each group was closed.
    pub(super) wgmma_waits: Vec<u32>,
    /// Stands at a barrier of threads.
    pub(super) waiting: bool,
}

impl Agent<'_> {
    /// Whether a step is run by the leader alone.
    pub(super) fn solo(&self) -> bool {
        let single = self.stage == Stage::Body && self.role.is_some_and(|r| r.single_thread);
        single || self.frames.iter().any(|f| f.who == Who::Leader)
    }
}

/// An mbarrier.
#[derive(Debug)]
pub(super) struct Mbarrier {
    pub(super) arrivals: i64,
    /// Arrivals that the phase still takes.
    pub(super) pending: i64,
    /// Announced bytes that have not come.
    pub(super) bytes: i64,
    /// Phases completed.
    pub(super) completed: u32,
    pub(super) component: u32,
    pub(super) gathering: Clock,
    /// What all completed phases hand to who waits for them.
    pub(super) released: Clock,
    /// Threads of an instance that need not all have seen the last completed phase yet: component, stamp, who.
    pub(super) seeing: Vec<(u32, u32, usize)>,
}

/// A barrier of threads.
#[derive(Debug)]
pub(super) struct Meeting {
    pub(super) need: u32,
    pub(super) got: u32,
    pub(super) clock: Clock,
    pub(super) members: Vec<usize>,
}

/// A block.
#[derive(Debug)]
pub(super) struct BlockState<'p> {
    pub(super) smem: Vec<Vec<SmemSlot<'p>>>,
    pub(super) barriers: Vec<Vec<Mbarrier>>,
    pub(super) initialised: bool,
    /// Component of the fence after the initialisation.
    pub(super) fence_component: u32,
    pub(super) named: Vec<Meeting>,
    pub(super) all: Meeting,
    /// What must be known to have happened before its memory goes away, and who did it.
    pub(super) until_exit: BTreeMap<u32, (u32, usize, &'p Stmt)>,
    pub(super) gone: bool,
}

/// A copy into the shared memory of one block.
#[derive(Debug)]
pub(super) struct Copying<'p> {
    pub(super) id: u64,
    pub(super) block: usize,
    pub(super) barrier: (usize, usize),
    pub(super) bytes: i64,
    pub(super) smem: (usize, usize),
    pub(super) rect: Rect,
    pub(super) data: Option<Buf>,
    pub(super) agent: usize,
    pub(super) stmt: &'p Stmt,
}

/// Whether an instance got on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Progress {
    Stepped,
    Blocked,
}

/// One cluster.
pub(super) struct Machine<'p, 'g> {
    pub(super) program: &'p Program,
    pub(super) options: &'g Options,
    pub(super) cluster: i64,
    pub(super) agents: Vec<Agent<'p>>,
    pub(super) blocks: Vec<BlockState<'p>>,
    pub(super) everyone: Meeting,
    /// What blocks brought to a combination across the cluster that is not complete.
    pub(super) brought: Vec<(usize, View)>,
    pub(super) copies: Vec<Copying<'p>>,
    pub(super) next_copy: u64,
    pub(super) params: Vec<Placed>,
    pub(super) global: &'g mut Global<'p>,
    /// `None`: values are not computed.
    pub(super) buffers: Option<&'g mut [Vec<u8>]>,
    pub(super) uses_grid_wait: bool,
    pub(super) grid_component: u32,
    pub(super) steps: u64,
    trace: VecDeque<(usize, &'p Stmt)>,
    precedence: Vec<usize>,
    random: u64,
}

fn any_step(block: &[Stmt], found: &dyn Fn(&Stmt) -> bool) -> bool {
    block.iter().any(|stmt| {
        found(stmt)
            || match stmt {
                Stmt::For { body, .. } | Stmt::Unroll { body, .. } | Stmt::Once(body) => {
                    any_step(body, found)
                }
                Stmt::If { then, otherwise, .. } => {
                    any_step(then, found) || any_step(otherwise, found)
                }
                _ => false,
            }
    })
}

/// First thread, number of threads, and the instance of a role, if they are one.
type Staff<'p> = (u32, u32, Option<(&'p Role, u32)>);

/// Who there is in a block: the instances, and the warps that no role has.
fn staff(program: &Program) -> Result<Vec<Staff<'_>>> {
    let mut instances = Vec::new();
    for role in &program.roles {
        for instance in 0..role.instances {
            let first = (role.first_warp + instance * role.warps) * 32;
            instances.push((first, role.warps * 32, Some((role, instance))));
        }
    }
    instances.sort_by_key(|s| s.0);
    let mut all = Vec::new();
    let mut next = 0;
    for &(first, threads, role) in &instances {
        if first < next {
            return Err(Error::bug(format!("roles of {} overlap", program.name)));
        }
        if first > next {
            all.push((next, first - next, None));
        }
        all.push((first, threads, role));
        next = first + threads;
    }
    if next > program.threads {
        return Err(Error::bug(format!("roles of {} exceed its threads", program.name)));
    }
    if next < program.threads {
        all.push((next, program.threads - next, None));
    }
    Ok(all)
}

/// Instances (`per_block` of them in each block) in the order in which they are asked to step.
fn precedence(order: &Order, blocks: usize, per_block: usize) -> Vec<usize> {
    let mut all: Vec<usize> = (0..blocks * per_block).collect();
    if let Order::Fixed { last_role_first, last_block_first, blocks_apart, .. } = *order {
        let key = |&a: &usize| {
            let (block, role) = (a / per_block, a % per_block);
            let block = if last_block_first { blocks - 1 - block } else { block };
            let role = if last_role_first { per_block - 1 - role } else { role };
            if blocks_apart { (block, role) } else { (role, block) }
        };
        all.sort_by_key(key);
    }
    all
}

/// Those of `orders` that can make a difference: a cluster of one block has no order of blocks, a program without copies
/// into shared memory no end of theirs, and one instance alone no order at all.
pub(super) fn that_differ(program: &Program, orders: Vec<Order>) -> Result<Vec<Order>> {
    let (blocks, per_block) = (program.cluster as usize, staff(program)?.len());
    let copies = blocks_of(program).any(|b| any_step(b, &|s| matches!(s, Stmt::TmaLoad { .. })));
    let mut seen = BTreeSet::new();
    let mut differs = |order: &Order| match *order {
        Order::Fixed { late, .. } => {
            seen.insert((precedence(order, blocks, per_block), late && copies))
        }
        Order::Random { .. } => copies || blocks * per_block > 1,
    };
    Ok(orders.into_iter().filter(|order| differs(order)).collect())
}

/// The blocks of steps that a program consists of.
fn blocks_of(program: &Program) -> impl Iterator<Item = &[Stmt]> {
    let shared = [program.setup.as_slice(), program.teardown.as_slice()];
    program.roles.iter().map(|r| r.body.as_slice()).chain(shared)
}

impl<'p, 'g> Machine<'p, 'g> {
    pub(super) fn new(
        program: &'p Program,
        sizes: &Env,
        (cluster, clusters): (u64, u64),
        options: &'g Options,
        global: &'g mut Global<'p>,
    ) -> Result<Machine<'p, 'g>> {
        let eval = |d: &Dim| {
            d.eval(sizes).ok_or_else(|| {
                Error::bug(format!("`{d}` in device program {} cannot be evaluated", program.name))
            })
        };
        let params = program
            .params
            .iter()
            .map(|(_, p)| Placed::new(p, &eval))
            .collect::<Result<Vec<_>>>()?;
        let all = staff(program)?;
        let blocks = program.cluster as usize;
        let n_agents = all.len() * blocks;
        let per_block: usize = program.barriers.iter().map(|(_, b)| b.slots as usize).sum();
        let n = n_agents * PARTS + blocks * (per_block + 1) + 1;

        let mut env: Vec<(Arc<str>, i64)> = sizes.iter().map(|(s, &v)| (s.clone(), v)).collect();
        env.push((Arc::from(CLUSTER), cluster as i64));
        env.push((Arc::from(CLUSTERS), clusters as i64));
        // Only `run` computes values; it sets the buffers after this.
        let meeting = |need| Meeting { need, got: 0, clock: Clock::new(n), members: Vec::new() };
        let mut machine = Machine {
            program,
            options,
            cluster: cluster as i64,
            agents: Vec::new(),
            blocks: Vec::new(),
            everyone: meeting(program.threads * program.cluster),
            brought: Vec::new(),
            copies: Vec::new(),
            next_copy: 1,
            params,
            global,
            buffers: None,
            uses_grid_wait: blocks_of(program)
                .any(|b| any_step(b, &|s| matches!(s, Stmt::GridWait))),
            grid_component: (n - 1) as u32,
            steps: 0,
            trace: VecDeque::new(),
            precedence: Vec::new(),
            random: 0,
        };
        for block in 0..blocks {
            for &(first, threads, role) in &all {
                let mut env = env.clone();
                env.push((Arc::from(CTA), block as i64));
                let name = match role {
                    Some((role, instance)) => format!("block {block} {} {instance}", role.name),
                    None => format!("block {block} threads {first}..{}", first + threads),
                };
                if let Some((role, instance)) = role {
                    env.push((role.instance.clone(), i64::from(instance)));
                }
                let names = env.len();
                machine.agents.push(Agent {
                    block,
                    name,
                    role: role.map(|r| r.0),
                    first_thread: first,
                    threads,
                    stage: Stage::Setup,
                    frames: vec![Frame {
                        block: &program.setup,
                        at: 0,
                        who: Who::Same,
                        names,
                        again: None,
                    }],
                    env,
                    rings: vec![0; program.rings.len()],
                    frags: Vec::new(),
                    shelves: Shelves::new(program),
                    clocks: Threads::new(machine.agents.len(), n),
                    stores: Groups::default(),
                    wgmma: Groups::default(),
                    wgmma_waits: Vec::new(),
                    waiting: false,
                });
            }
            let mut next = (n_agents * PARTS + block * (per_block + 1)) as u32;
            let barriers = program.barriers.iter().map(|(_, b)| {
                let slots = (0..b.slots).map(|_| {
                    next += 1;
                    Mbarrier {
                        arrivals: i64::from(b.arrivals),
                        pending: i64::from(b.arrivals),
                        bytes: 0,
                        completed: 0,
                        component: next - 1,
                        gathering: Clock::new(n),
                        released: Clock::new(n),
                        seeing: Vec::new(),
                    }
                });
                slots.collect()
            });
            let barriers: Vec<Vec<Mbarrier>> = barriers.collect();
            machine.blocks.push(BlockState {
                smem: Vec::new(),
                barriers,
                initialised: false,
                fence_component: next,
                named: (0..16).map(|_| meeting(0)).collect(),
                all: meeting(program.threads),
                until_exit: BTreeMap::new(),
                gone: false,
            });
        }
        if let Order::Random { seed } = options.order {
            machine.random = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        }
        machine.precedence = precedence(&options.order, blocks, all.len());
        Ok(machine)
    }

    /// Memory, once it is known whether values are computed.
    fn make_memory(&mut self) {
        let compute = self.buffers.is_some();
        let program = self.program;
        for block in &mut self.blocks {
            let buffers = program.smem.iter().map(|(_, s)| {
                let slot = |_| SmemSlot::new(s.rows as usize, s.cols as usize, s.dtype, compute);
                (0..s.slots).map(slot).collect()
            });
            block.smem = buffers.collect();
        }
        for agent in self.agents.iter_mut().filter(|a| a.role.is_some()) {
            let frags = program.frags.iter().map(|(_, f)| {
                let rows = if f.extent == Extent::PerCol { 1 } else { f.rows as usize };
                let cols = if f.extent == Extent::PerRow { 1 } else { f.cols as usize };
                FragState::new(rows, cols, f.dtype, compute)
            });
            agent.frags = frags.collect();
        }
    }

    /// A number below `n` (xorshift64*).
    fn pick(&mut self, n: usize) -> usize {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        ((self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize) % n
    }

    /// Runs until all instances are done.
    pub(super) fn run(&mut self) -> Result<()> {
        self.make_memory();
        match self.options.order {
            Order::Fixed { late, .. } => self.run_fixed(late)?,
            Order::Random { .. } => self.run_random()?,
        }
        if let Some(copy) = self.copies.first() {
            return Err(self.fail(copy.agent, copy.stmt, "ends after the kernel"));
        }
        Ok(())
    }

    fn run_fixed(&mut self, late: bool) -> Result<()> {
        let precedence = self.precedence.clone();
        loop {
            while !late && !self.copies.is_empty() {
                self.end_copy(0)?;
            }
            let mut stepped = false;
            for &agent in &precedence {
                if self.step(agent)? == Progress::Stepped {
                    stepped = true;
                    break;
                }
            }
            if stepped {
                continue;
            }
            if !self.copies.is_empty() {
                // The newest first: no order among copies is promised.
                self.end_copy(self.copies.len() - 1)?;
            } else if self.all_done() {
                return Ok(());
            } else {
                return Err(self.deadlock());
            }
        }
    }

    fn run_random(&mut self) -> Result<()> {
        let mut alive: Vec<usize> = self.precedence.clone();
        loop {
            let mut stepped = false;
            // A burst of one instance, picked among those that can step.
            let mut candidates = alive.clone();
            while !candidates.is_empty() && !stepped {
                let at = self.pick(candidates.len());
                let agent = candidates.swap_remove(at);
                let burst = 1 + self.pick(8);
                for _ in 0..burst {
                    if self.step(agent)? == Progress::Blocked {
                        break;
                    }
                    stepped = true;
                }
            }
            alive.retain(|&a| self.agents[a].stage != Stage::Done);
            if !self.copies.is_empty() && (!stepped || self.pick(4) == 0) {
                let at = self.pick(self.copies.len());
                self.end_copy(at)?;
            } else if !stepped {
                return if self.all_done() { Ok(()) } else { Err(self.deadlock()) };
            }
        }
    }

    fn all_done(&self) -> bool {
        self.agents.iter().all(|a| a.stage == Stage::Done)
    }

    /// Counts a step and keeps it for reports.
    pub(super) fn count(&mut self, agent: usize, stmt: &'p Stmt) -> Result<()> {
        self.steps += 1;
        if self.trace.len() == TRACE {
            self.trace.pop_front();
        }
        self.trace.push_back((agent, stmt));
        if self.steps > MOST_STEPS {
            return Err(self.fail(agent, stmt, "is reached after too many steps: it never ends"));
        }
        Ok(())
    }

    /// An instance is done; its block may be.
    pub(super) fn finish(&mut self, agent: usize) -> Result<()> {
        let a = &self.agents[agent];
        let read = a.clocks.leader.knows(component(agent, Part::StoreRead), a.stores.committed);
        let open = [
            (a.stores.open > 0, "stores that no group took"),
            (!read, "stores that may still read its shared memory"),
            (!a.wgmma.is_complete(), "wgmma groups that it has not waited for"),
            (
                !a.clocks.leader_copy.is_complete() || !a.clocks.others_copy.is_complete(),
                "plain copies that it has not waited for",
            ),
        ];
        if let Some((_, what)) = open.iter().find(|o| o.0) {
            return Err(self.report(format!("{} ends with {what}", a.name)));
        }
        let block = a.block;
        let staff = || self.agents.iter().filter(|a| a.block == block);
        if staff().any(|a| a.stage != Stage::Done) {
            return Ok(());
        }
        let mut clock = Clock::new(self.grid_component as usize + 1);
        staff().for_each(|a| clock.join(&a.clocks.together()));
        let state = &self.blocks[block];
        for (&component, &(stamp, agent, stmt)) in &state.until_exit {
            if !clock.knows(component, stamp) {
                let what = format!("may touch block {block} after it is gone");
                return Err(self.fail(agent, stmt, &what));
            }
        }
        for (id, barrier) in self.program.barriers.iter() {
            for (slot, b) in state.barriers[id.index()].iter().enumerate() {
                if b.bytes != 0 {
                    let (name, bytes) = (&barrier.name, b.bytes);
                    return Err(self.report(format!(
                        "block {block} ends while {name}[{slot}] is {bytes} bytes short"
                    )));
                }
            }
        }
        self.blocks[block].gone = true;
        Ok(())
    }

    fn deadlock(&self) -> Error {
        let mut error = Error::bug(format!("deadlock in device program {}", self.program.name));
        for (index, agent) in self.agents.iter().enumerate() {
            let Some(frame) = agent.frames.last() else { continue };
            let Some(stmt) = frame.block.get(frame.at) else { continue };
            let mut line = format!("{} waits at `{}`", agent.name, self.program.step_text(stmt));
            if let Stmt::Wait { barrier, .. } = stmt
                && let Ok(slot) = self.slot(index, stmt, &barrier.slot, u32::MAX)
                && let Some(b) =
                    self.blocks[agent.block].barriers[barrier.barrier.index()].get(slot)
            {
                line.push_str(&format!(
                    " (slot {slot}: phase {} lacks {} arrivals and {} bytes)",
                    b.completed, b.pending, b.bytes
                ));
            }
            error = error.with_note(format!("{line}{}", self.bindings(index)));
        }
        self.with_trace(error)
    }

    fn bindings(&self, agent: usize) -> String {
        let env: Vec<String> =
            self.agents[agent].env.iter().map(|(s, v)| format!("{s}={v}")).collect();
        format!(" with {}", env.join(" "))
    }

    fn with_trace(&self, mut error: Error) -> Error {
        for (agent, stmt) in &self.trace {
            let (name, text) = (&self.agents[*agent].name, self.program.step_text(stmt));
            error = error.with_note(format!("before: {name}: {text}"));
        }
        error
    }

    pub(super) fn report(&self, message: String) -> Error {
        self.with_trace(Error::bug(message))
    }

    /// The violation `what` of a step.
    pub(super) fn fail(&self, agent: usize, stmt: &Stmt, what: &str) -> Error {
        let (name, text) = (&self.agents[agent].name, self.program.step_text(stmt));
        self.report(format!("{name}: `{text}` {what}{}", self.bindings(agent)))
    }

    /// The violation of an access.
    pub(super) fn conflict(
        &self,
        agent: usize,
        stmt: &Stmt,
        memory: &str,
        conflict: Conflict<'p>,
    ) -> Error {
        let other = |a: &Access<'p>| {
            let verb = if a.kind == super::memory::Kind::Read { "read" } else { "write" };
            let text = self.program.step_text(a.stmt);
            format!("the {verb} by {}: `{text}`", self.agents[a.agent].name)
        };
        let what = match conflict {
            Conflict::Race(a) => format!("on {memory} is not ordered after {}", other(&a)),
            Conflict::Fence(a) => {
                format!("on {memory} does not see {}: no fence by its thread", other(&a))
            }
            Conflict::Proxy(a) => {
                format!(
                    "on {memory} does not see {}, which is no work of the copy engine",
                    other(&a)
                )
            }
            Conflict::Unwritten => format!("reads {memory}, part of which nobody has written"),
        };
        self.fail(agent, stmt, &what)
    }
}
