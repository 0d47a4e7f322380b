//! Shared memory, global memory and registers: who touched what, and the values.
//!
//! A slot of a buffer keeps its recent accesses, each a rectangle of elements. A new access is
//! compared with those that it overlaps; a write takes the place of all that it covers. Global tensors
//! that are written keep the last write and the reads since, per element.

use super::clock::Clock;
use crate::value::Buf;
use std::collections::BTreeMap;
use tilewright_base::DType;
use tilewright_device::Stmt;

/// A stamp that no clock reaches: the end is not known yet.
pub(super) const PENDING: u32 = u32::MAX;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Read,
    Write,
    /// Adds indivisibly; any order with others of its kind.
    Add,
}

/// Which memory operations an access is among.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Proxy {
    Generic,
    Async,
}

/// Rows `r0..r1`, columns `c0..c1`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rect {
    pub(super) r0: usize,
    pub(super) r1: usize,
    pub(super) c0: usize,
    pub(super) c1: usize,
}

impl Rect {
    fn meets(&self, o: &Rect) -> bool {
        self.r0 < o.r1 && o.r0 < self.r1 && self.c0 < o.c1 && o.c0 < self.c1
    }

    fn covers(&self, o: &Rect) -> bool {
        self.r0 <= o.r0 && o.r1 <= self.r1 && self.c0 <= o.c0 && o.c1 <= self.c1
    }

    pub(super) fn rows(&self) -> usize {
        self.r1 - self.r0
    }

    pub(super) fn cols(&self) -> usize {
        self.c1 - self.c0
    }
}

/// One access.
#[derive(Clone, Copy, Debug)]
pub(super) struct Access<'p> {
    pub(super) component: u32,
    pub(super) stamp: u32,
    pub(super) kind: Kind,
    pub(super) proxy: Proxy,
    /// Number of the copy that it is part of; 0 for none.
    pub(super) load: u64,
    pub(super) agent: usize,
    pub(super) stmt: &'p Stmt,
}

/// Why an access is wrong.
#[derive(Clone, Copy, Debug)]
pub(super) enum Conflict<'p> {
    /// Nothing orders it after this one.
    Race(Access<'p>),
    /// It is ordered, but it is the copy engine's or the tensor cores', and no fence stands behind this plain
    /// access.
    Fence(Access<'p>),
    /// It is the copy engine's, after a plain access to global memory, which no step orders it after.
    Proxy(Access<'p>),
    /// It reads what nobody has written.
    Unwritten,
}

/// One slot of a buffer.
#[derive(Debug)]
pub(super) struct SmemSlot<'p> {
    pub(super) cols: usize,
    written: Vec<bool>,
    accesses: Vec<(Rect, Access<'p>)>,
    /// Empty when values are not computed.
    pub(super) data: Buf,
}

/// Zeros of a type.
pub(super) fn zeros(dtype: DType, n: usize) -> Buf {
    if dtype.is_float() { Buf::F(vec![0.0; n]) } else { Buf::I(vec![0; n]) }
}

impl<'p> SmemSlot<'p> {
    pub(super) fn new(rows: usize, cols: usize, dtype: DType, compute: bool) -> SmemSlot<'p> {
        let data = zeros(dtype, if compute { rows * cols } else { 0 });
        SmemSlot { cols, written: vec![false; rows * cols], accesses: Vec::new(), data }
    }

    /// Compares an access with those before it and records it.
    pub(super) fn touch(
        &mut self,
        rect: Rect,
        access: Access<'p>,
        clock: &Clock,
    ) -> Result<(), Conflict<'p>> {
        for (other_rect, other) in &self.accesses {
            if !rect.meets(other_rect) || (access.kind, other.kind) == (Kind::Read, Kind::Read) {
                continue;
            }
            if !clock.knows(other.component, other.stamp) {
                return Err(Conflict::Race(*other));
            }
            let crosses = (access.proxy, other.proxy) == (Proxy::Async, Proxy::Generic);
            if crosses && !clock.sees(other.component, other.stamp) {
                return Err(Conflict::Fence(*other));
            }
        }
        let mut rows = (rect.r0..rect.r1).map(|r| r * self.cols + rect.c0..r * self.cols + rect.c1);
        if access.kind == Kind::Read {
            if !rows.all(|row| self.written[row].iter().all(|&w| w)) {
                return Err(Conflict::Unwritten);
            }
            let same = self
                .accesses
                .iter_mut()
                .find(|(r, a)| (*r, a.component, a.kind) == (rect, access.component, Kind::Read));
            match same {
                Some((_, older)) => *older = access,
                None => self.accesses.push((rect, access)),
            }
        } else {
            rows.for_each(|row| self.written[row].fill(true));
            self.accesses.retain(|(older, _)| !rect.covers(older));
            self.accesses.push((rect, access));
        }
        Ok(())
    }

    /// A copy has ended: its accesses get the stamp of the barrier's phase.
    pub(super) fn settle(&mut self, load: u64, stamp: u32) {
        for (_, access) in self.accesses.iter_mut().filter(|(_, a)| a.load == load) {
            access.stamp = stamp;
        }
    }
}

/// An access to one element of a global tensor, by which cluster, and through which distribution over threads
/// (the same one, at the same place: each element is the same thread's).
#[derive(Clone, Copy, Debug)]
pub(super) struct GlobalAccess<'p> {
    pub(super) cluster: i64,
    pub(super) mapping: u32,
    pub(super) access: Access<'p>,
}

/// Numbers of accesses: mostly none or one.
#[derive(Debug, Default)]
enum Numbers {
    #[default]
    None,
    One(u32),
    Several(Vec<u32>),
}

impl Numbers {
    fn list(&self) -> &[u32] {
        match self {
            Numbers::None => &[],
            Numbers::One(one) => std::slice::from_ref(one),
            Numbers::Several(all) => all,
        }
    }

    fn retain(&mut self, keep: impl Fn(u32) -> bool) {
        match self {
            Numbers::Several(all) => all.retain(|n| keep(*n)),
            Numbers::One(one) if !keep(*one) => *self = Numbers::None,
            _ => {}
        }
    }

    fn push(&mut self, number: u32) {
        match self {
            Numbers::None => *self = Numbers::One(number),
            Numbers::One(one) => *self = Numbers::Several(vec![*one, number]),
            Numbers::Several(all) => all.push(number),
        }
    }
}

#[derive(Debug, Default)]
struct Element {
    /// Writes that are not ordered among each other only when they all add.
    writes: Numbers,
    reads: Numbers,
}

/// Accesses to global tensors, from all clusters.
#[derive(Debug, Default)]
pub(super) struct Global<'p> {
    /// By parameter and element offset.
    elements: Vec<Vec<Element>>,
    /// One for all elements of a tile.
    accesses: Vec<GlobalAccess<'p>>,
    mappings: BTreeMap<String, u32>,
}

impl<'p> Global<'p> {
    pub(super) fn new(params: usize) -> Global<'p> {
        let elements = (0..params).map(|_| Vec::new()).collect();
        Global { elements, accesses: Vec::new(), mappings: BTreeMap::new() }
    }

    /// A number for a distribution over threads.
    pub(super) fn mapping(&mut self, description: String) -> u32 {
        let next = self.mappings.len() as u32 + 1;
        *self.mappings.entry(description).or_insert(next)
    }

    /// The number of an access; that of the last one if it is the same.
    fn number(&mut self, new: GlobalAccess<'p>) -> u32 {
        let same = self.accesses.last().is_some_and(|old| {
            let (x, y) = (&old.access, &new.access);
            (old.cluster, old.mapping, x.component, x.stamp, x.kind, x.proxy)
                == (new.cluster, new.mapping, y.component, y.stamp, y.kind, y.proxy)
                && std::ptr::eq(x.stmt, y.stmt)
        });
        if !same {
            self.accesses.push(new);
        }
        self.accesses.len() as u32 - 1
    }

    /// Compares an access to an element with those before it and records it.
    pub(super) fn touch(
        &mut self,
        param: usize,
        offset: usize,
        new: GlobalAccess<'p>,
        clock: &Clock,
    ) -> Result<(), Conflict<'p>> {
        let number = self.number(new);
        let accesses = &self.accesses;
        let list = &mut self.elements[param];
        if list.len() <= offset {
            list.resize_with(offset + 1, Element::default);
        }
        let element = &mut list[offset];
        let ordered = |old: &GlobalAccess<'p>| {
            let same_thread = new.mapping != 0
                && (new.mapping, new.access.component) == (old.mapping, old.access.component);
            old.cluster == new.cluster
                && (same_thread || clock.knows(old.access.component, old.access.stamp))
        };
        let kind = new.access.kind;
        for old in element.writes.list().iter().map(|n| &accesses[*n as usize]) {
            let both_add = (kind, old.access.kind) == (Kind::Add, Kind::Add);
            if !both_add && !ordered(old) {
                return Err(Conflict::Race(old.access));
            }
            // The fence that there is (`fence.proxy.async.shared::cta`) is one of shared memory.
            if (new.access.proxy, old.access.proxy) == (Proxy::Async, Proxy::Generic) {
                return Err(Conflict::Proxy(old.access));
            }
        }
        if kind == Kind::Read {
            element.reads.retain(|n| {
                let r = &accesses[n as usize];
                (r.cluster, r.access.component, r.mapping)
                    != (new.cluster, new.access.component, new.mapping)
            });
            element.reads.push(number);
            return Ok(());
        }
        let mut reads = element.reads.list().iter().map(|n| &accesses[*n as usize]);
        if let Some(old) = reads.find(|r| !ordered(r)) {
            return Err(Conflict::Race(old.access));
        }
        element.reads = Numbers::None;
        element.writes.retain(|n| {
            let w = &accesses[n as usize];
            kind == Kind::Add && w.access.kind == Kind::Add && !ordered(w)
        });
        element.writes.push(number);
        Ok(())
    }
}

/// What is known of a fragment's column.
#[derive(Clone, Copy, Debug)]
pub(super) struct Column {
    pub(super) written: bool,
    /// Touched by plain steps since the last `wgmma` fence.
    pub(super) touched: bool,
    /// Written by plain steps since the last `wgmma` fence.
    pub(super) changed: bool,
    /// The last `wgmma` group that accumulates into it.
    pub(super) accumulated: u32,
    /// The last `wgmma` group that reads it as an operand.
    pub(super) operand: u32,
    /// First and last column and bits of an operand's element of the `wgmma` that have accumulated into it since
    /// the last fence.
    pub(super) shape: Option<(usize, usize, u32)>,
}

/// A fragment of one instance.
#[derive(Debug)]
pub(super) struct FragState {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) columns: Vec<Column>,
    /// Row-major; empty when values are not computed.
    pub(super) data: Buf,
}

impl FragState {
    pub(super) fn new(rows: usize, cols: usize, dtype: DType, compute: bool) -> FragState {
        let column = Column {
            written: false,
            touched: true,
            changed: true,
            accumulated: 0,
            operand: 0,
            shape: None,
        };
        let data = zeros(dtype, if compute { rows * cols } else { 0 });
        FragState { rows, cols, columns: vec![column; cols], data }
    }
}
