//! Rules about what a program declares: its block, roles, memory, maps, barriers.

use super::{Checker, walk};
use crate::ir::*;
use crate::lines::Shelf;
use std::collections::BTreeSet;
use tilewright_base::DType;

/// Registers of a multiprocessor (CPG, "Technical Specifications per Compute Capability").
const REGISTERS: u32 = 65536;

impl Checker<'_> {
    pub(super) fn declarations(&mut self) {
        let p = self.program;
        let threads = p.threads;
        let whole = (32..=1024).contains(&threads) && threads.is_multiple_of(32);
        self.require(whole, || format!("a block of {threads} threads is not 1 to 32 whole warps"));
        let cluster = p.cluster;
        // Up to eight wherever there are clusters; sixteen where the device has room, asked for at launch (CUDA C++
        // Programming Guide, "Thread Block Clusters").
        self.require((1..=16).contains(&cluster), || format!("a cluster of {cluster} blocks"));
        let (used, most) = (p.smem_bytes(), p.arch.smem_bytes());
        self.require(used <= most, || {
            format!("{used} bytes of shared memory; {} has {most}", p.arch.name())
        });
        self.require(p.blocks_per_sm >= 1, || "no block per multiprocessor".to_string());
        let mut unknown = Vec::new();
        p.items.for_each_symbol(&mut |s| {
            if !p.symbols.iter().any(|known| known.name == *s) {
                unknown.push(s.clone());
            }
        });
        for name in unknown {
            self.wrong(format!("items: `{name}` is not bound"));
        }
        self.roles();
        self.memory();
        self.maps();
        for (_, f) in p.frags.iter() {
            self.spread(f);
        }
        for (_, s) in p.shelves.iter() {
            self.shelf_spread(s);
        }
        if p.arch < Arch::Sm90a {
            self.before_hopper();
        }
    }

    fn roles(&mut self) {
        let p = self.program;
        let warps = p.threads / 32;
        let mut taken = BTreeSet::new();
        for role in &p.roles {
            let name = &role.name;
            let end =
                u64::from(role.first_warp) + u64::from(role.warps) * u64::from(role.instances);
            if role.warps == 0 || role.instances == 0 || end > u64::from(warps) {
                self.wrong(format!("role {name} is not inside of the block's {warps} warps"));
                continue;
            }
            let fresh = (role.first_warp..end as u32).all(|warp| taken.insert(warp));
            self.require(fresh, || format!("role {name} shares warps with another"));
            if let Some(registers) = role.registers {
                let legal = (24..=256).contains(&registers) && registers % 8 == 0;
                self.require(legal, || {
                    format!("role {name}: {registers} registers are not 24 to 256 in steps of 8")
                });
                let groups = role.first_warp % 4 == 0 && (role.warps * role.instances) % 4 == 0;
                self.require(groups, || {
                    format!("role {name} sets registers but is not whole warpgroups")
                });
            }
        }
        if p.roles.iter().all(|r| r.registers.is_none()) || p.threads == 0 {
            return;
        }
        let blocks = p.blocks_per_sm.max(1);
        let launch = (REGISTERS / p.threads.saturating_mul(blocks).max(1) / 8 * 8).min(256);
        let mut sum = 0;
        let mut others = warps;
        for role in &p.roles {
            let warps = role.warps.saturating_mul(role.instances);
            if let Some(registers) = role.registers {
                sum += u64::from(registers) * 32 * u64::from(warps);
                others = others.saturating_sub(warps);
            }
        }
        sum += u64::from(launch) * 32 * u64::from(others);
        let given = launch * p.threads;
        self.require(sum <= u64::from(given), || {
            format!("roles set {sum} registers, the launch gives {given} ({launch} per thread)")
        });
    }

    fn memory(&mut self) {
        let p = self.program;
        for (_, s) in p.smem.iter() {
            let name = &s.name;
            if s.contiguous > 1 || s.rows == 0 || s.cols == 0 || s.slots == 0 {
                self.wrong(format!("buffer {name} = {s} has no elements or no such axis"));
                continue;
            }
            let (along, lines) =
                if s.contiguous == 1 { (s.cols, s.rows) } else { (s.rows, s.cols) };
            let bytes = u64::from(along) * u64::from(s.dtype.bits()) / 8;
            if s.swizzle != Swizzle::None {
                let panels = bytes.is_multiple_of(u64::from(s.swizzle.span_bytes()));
                self.require(panels, || format!("buffer {name} = {s} has no whole panels"));
                let groups = lines % 8 == 0;
                self.require(groups, || {
                    format!("buffer {name} = {s} has no whole groups of 8 lines")
                });
            }
        }
        for (_, b) in p.barriers.iter() {
            let legal = b.slots >= 1 && (1..1 << 20).contains(&b.arrivals);
            let (name, slots, arrivals) = (&b.name, b.slots, b.arrivals);
            self.require(legal, || {
                format!("barrier {name} x{slots} takes {arrivals} arrivals, not 1 to 2^20 - 1")
            });
        }
        for (_, r) in p.rings.iter() {
            self.require(r.stages >= 1, || format!("ring {} has no stages", r.name));
        }
    }

    fn maps(&mut self) {
        let p = self.program;
        for (_, m) in p.maps.iter() {
            let name = &m.name;
            let Some(param) = p.params.get(m.param) else {
                self.wrong(format!("map {name}: the tensor does not exist"));
                continue;
            };
            let rank = param.layout.rank();
            let axes = (1..=5).contains(&rank) && m.box_shape.len() == rank && m.contiguous < rank;
            self.require(axes, || format!("map {name}: a box over {rank} axes"));
            let extents = m.box_shape.iter().all(|e| (1..=256).contains(e));
            let shape = &m.box_shape;
            self.require(extents, || format!("map {name}: box {shape:?} is not 1 to 256 each"));
            if !axes {
                continue;
            }
            if let Some(w) = &m.windows {
                // Coordinates of a window's first pixel have 8 bits, with their sign.
                let steps = w.steps.iter().all(|s| (1..=8).contains(s));
                let before = w.before.iter().all(|b| (0..=127).contains(b));
                self.require(steps && before && (rank, m.contiguous) == (2, 1), || {
                    format!("map {name}: windows of steps 1 to 8 over lines of channels")
                });
            }
            let axis = &param.layout.axes[m.contiguous];
            let plain = axis.stride.is(1) && param.layout.axes.iter().all(|a| a.block.is_none());
            self.require(plain, || {
                format!("map {name}: axis {} of the tensor is not contiguous", m.contiguous)
            });
            let bits = u64::from(param.dtype.bits());
            let inner = u64::from(m.box_shape[m.contiguous]) * bits / 8;
            let single = param.dtype == DType::F32;
            self.require(single || !m.tf32, || {
                format!("map {name}: {} is not rounded to tf32", param.dtype)
            });
            let elements: u64 = shape.iter().map(|&e| u64::from(e)).product();
            let (span, swizzle) = (m.swizzle.span_bytes(), m.swizzle);
            // A single line is one run, however long.
            let line = m.swizzle == Swizzle::None && elements * bits == inner * 8;
            self.require(line || inner <= u64::from(span), || {
                format!("map {name}: {inner} bytes are more than a span of swizzle {swizzle}")
            });
            self.require(inner % 16 == 0, || {
                format!("map {name}: {inner} bytes of a box are not a multiple of 16")
            });
            self.require(bits >= 8, || format!("map {name}: {} is packed", param.dtype));
        }
    }

    fn spread(&mut self, f: &Frag) {
        let fits = match f.spread {
            Spread::Wgmma => f.rows.is_multiple_of(64) && f.cols.is_multiple_of(8),
            Spread::MmaSync { warps_m, warps_n } => {
                let (m, n) = (warps_m.saturating_mul(16), warps_n.saturating_mul(16));
                m > 0 && n > 0 && f.rows.is_multiple_of(m) && f.cols.is_multiple_of(n)
            }
            Spread::Lines { lanes, vector, threads } => {
                lanes.is_power_of_two() && vector >= 1 && threads > 0 && threads % lanes == 0
            }
            Spread::Outer { threads_m, threads_n, block_m, block_n } => {
                let warps = threads_m.is_multiple_of(8) && threads_n.is_multiple_of(4);
                let blocks = [block_m, block_n].iter().all(|b| matches!(b, 1 | 4));
                let (m, n) = (threads_m.saturating_mul(block_m), threads_n.saturating_mul(block_n));
                warps
                    && blocks
                    && m > 0
                    && n > 0
                    && f.rows.is_multiple_of(m)
                    && f.cols.is_multiple_of(n)
            }
        };
        let some = f.rows > 0 && f.cols > 0;
        self.require(fits && some, || format!("fragment {} = {f} does not fit its spread", f.name));
    }

    /// Every thread has whole runs of a shelf's tiles.
    fn shelf_spread(&mut self, s: &Shelf) {
        let fits = match s.spread {
            Spread::Lines { lanes, vector, threads } => {
                let lines = threads / lanes.max(1);
                lines > 0
                    && s.vector > 0
                    && vector.is_multiple_of(s.vector)
                    && s.rows.is_multiple_of(lines)
                    && s.cols.is_multiple_of(lanes.saturating_mul(vector).max(1))
            }
            _ => false,
        };
        let some = s.rows > 0 && s.cols > 0 && s.slots > 0 && s.dtype.bits() >= 8;
        self.require(fits && some, || format!("shelf {} does not fit its spread", s.name));
    }

    fn before_hopper(&mut self) {
        let (p, arch) = (self.program, self.program.arch.name());
        let has = [
            (!p.maps.is_empty(), "tensor maps"),
            (!p.barriers.is_empty(), "mbarriers"),
            (p.cluster > 1, "clusters"),
            (p.roles.iter().any(|r| r.registers.is_some()), "setmaxnreg"),
            (p.frags.iter().any(|(_, f)| f.spread == Spread::Wgmma), "wgmma fragments"),
        ];
        for (_, what) in has.iter().filter(|h| h.0) {
            self.wrong(format!("{arch} has no {what}"));
        }
        let mut steps = Vec::new();
        let bodies = p.roles.iter().map(|r| &r.body).chain([&p.setup, &p.teardown]);
        for body in bodies {
            walk(body, &mut |stmt| {
                let newer = matches!(
                    stmt,
                    Stmt::BarrierInit
                        | Stmt::FenceBarrierInit
                        | Stmt::SyncCluster
                        | Stmt::Wait { .. }
                        | Stmt::Arrive { .. }
                        | Stmt::ExpectBytes { .. }
                        | Stmt::TmaLoad { .. }
                        | Stmt::TmaStore { .. }
                        | Stmt::TmaCommit
                        | Stmt::TmaWait { .. }
                        | Stmt::FenceAsync
                        | Stmt::WgmmaFence
                        | Stmt::Wgmma { .. }
                        | Stmt::WgmmaCommit
                        | Stmt::WgmmaWait { .. }
                        | Stmt::GridWait
                        | Stmt::GridRelease
                );
                if newer {
                    steps.push(stmt);
                }
            });
        }
        for stmt in steps {
            self.step(stmt, false, &format!("{arch} has no such instruction"));
        }
    }

    /// Barriers that are waited for get arrivals from somewhere.
    pub(super) fn arrivals(&mut self) {
        let p = self.program;
        let (mut waited, mut arrived, mut initialised) = (BTreeSet::new(), BTreeSet::new(), false);
        let bodies = p.roles.iter().map(|r| &r.body).chain([&p.setup, &p.teardown]);
        for body in bodies {
            walk(body, &mut |stmt| match stmt {
                Stmt::Wait { barrier, .. } => drop(waited.insert(barrier.barrier)),
                Stmt::Arrive { barrier, .. } | Stmt::ExpectBytes { barrier, .. } => {
                    arrived.insert(barrier.barrier);
                }
                Stmt::BarrierInit => initialised = true,
                _ => {}
            });
        }
        for id in waited.difference(&arrived) {
            let name = p.barriers.get(*id).map_or(String::new(), |b| b.name.clone());
            self.wrong(format!("barrier {name} is waited for, and nothing arrives at it"));
        }
        self.require(initialised || p.barriers.is_empty(), || {
            "barriers are never initialised".to_string()
        });
    }
}
