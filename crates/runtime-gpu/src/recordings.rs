//! [`Recordings`]: graphs of runs whose addresses come back.
//!
//! A framework whose allocator hands out the same blocks in each step of a loop repeats the addresses of a run. The second
//! time that addresses come they are recorded, from then on replayed: one call of the driver instead of one per
//! kernel. Addresses that never come back cost a comparison.

use std::hash::{DefaultHasher, Hash, Hasher};
use tilewright_base::Result;
use tilewright_cuda::{GraphExec, Stream};

/// How many graphs are kept; further addresses are launched kernel by kernel.
const MAX_GRAPHS: usize = 32;

/// How many sets of addresses are remembered that came once.
const MAX_SEEN: usize = 64;

/// See the module's head.
pub(crate) struct Recordings {
    /// Where graphs are recorded.
    stream: Stream,
    graphs: Vec<(u64, Vec<u64>, GraphExec)>,
    /// Hashes of addresses that came once, the latest last.
    seen: Vec<u64>,
    /// A recording failed: what fails once fails again.
    failed: bool,
}

/// What to do with a run.
pub(crate) enum Next<'a> {
    Replay(&'a GraphExec),
    Launch,
}

impl Recordings {
    /// None yet; `stream` is for recording only.
    pub(crate) fn new(stream: &Stream) -> Recordings {
        Recordings { stream: stream.clone(), graphs: Vec::new(), seen: Vec::new(), failed: false }
    }

    /// Finds the graph for these addresses; where they come for the second time, `record` is asked for its launches.
    pub(crate) fn next<I: Iterator<Item = u64>>(
        &mut self,
        addresses: impl Fn() -> I,
        record: impl FnOnce(&Stream) -> Result<()>,
    ) -> Next<'_> {
        let mut hasher = DefaultHasher::new();
        addresses().for_each(|address| address.hash(&mut hasher));
        let hash = hasher.finish();
        let same = |known: &(u64, Vec<u64>, GraphExec)| {
            known.0 == hash && known.1.iter().copied().eq(addresses())
        };
        if let Some(at) = self.graphs.iter().position(same) {
            return Next::Replay(&self.graphs[at].2);
        }
        if self.failed || self.graphs.len() >= MAX_GRAPHS {
            return Next::Launch;
        }
        let Some(at) = self.seen.iter().position(|s| *s == hash) else {
            if self.seen.len() >= MAX_SEEN {
                self.seen.remove(0);
            }
            self.seen.push(hash);
            return Next::Launch;
        };
        self.seen.remove(at);
        match self.stream.capture(record).and_then(|graph| graph.instantiate()) {
            Ok(graph) => {
                self.graphs.push((hash, addresses().collect(), graph));
                self.graphs.last().map_or(Next::Launch, |(_, _, graph)| Next::Replay(graph))
            }
            Err(_) => {
                self.failed = true;
                Next::Launch
            }
        }
    }
}
