//! [`Graph`]: launches recorded once, and [`GraphExec`]: replayed with one call.
//!
//! ```no_run
//! # fn f(stream: &tilewright_cuda::Stream, launch: &tilewright_cuda::PreparedLaunch) -> tilewright_base::Result<()> {
//! // SAFETY: the launch's buffers and module live longer than the graph.
//! let graph = stream.capture(|stream| unsafe { launch.launch(stream) })?;
//! let exec = graph.instantiate()?;
//! // SAFETY: as above.
//! unsafe { exec.launch(stream)? };
//! # Ok(())
//! # }
//! ```

use super::api::{UpdateResult, code};
use super::device::Gpu;
use super::launch::PreparedLaunch;
use super::stream::Stream;
use cudarc::driver::sys;
use std::ffi::{CStr, c_char, c_int};
use std::fmt;
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::Arc;
use tilewright_base::{Error, Result};

/// A recorded sequence. Cheap to clone.
#[derive(Clone)]
pub struct Graph(Arc<Inner>);

struct Inner {
    gpu: Gpu,
    raw: sys::CUgraph,
}

// SAFETY: a handle, usable on any thread; the driver asks that one graph is not used by two threads
// at once, which `Graph` grants: after its recording it is only read.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

/// Ends a recording that was left by an error or a panic.
struct Recording<'a> {
    stream: &'a Stream,
    running: bool,
}

impl Recording<'_> {
    fn end(&mut self) -> (c_int, sys::CUgraph) {
        self.running = false;
        let mut raw = null_mut();
        let gpu = self.stream.gpu();
        let _ = gpu.make_current();
        // SAFETY: a stream that is recording, and a place for the graph.
        let code = unsafe { (gpu.0.api.stream_end_capture)(self.stream.0.raw, &mut raw) };
        self.stream.free_deferred();
        (code, raw)
    }
}

impl Drop for Recording<'_> {
    fn drop(&mut self) {
        if self.running {
            let (_, raw) = self.end();
            if !raw.is_null() {
                // SAFETY: a graph that nobody else has.
                let _ = unsafe { (self.stream.gpu().0.api.graph_destroy)(raw) };
            }
        }
    }
}

impl Stream {
    /// Records what `record` puts into the stream, and runs none of it. Recorded can be launches,
    /// fills and copies on the device; what waits or allocates cannot, and the error says so.
    pub fn capture(&self, record: impl FnOnce(&Stream) -> Result<()>) -> Result<Graph> {
        let gpu = self.gpu();
        gpu.make_current()?;
        let api = gpu.0.api;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: a stream of the current context.
        let code = unsafe { (api.stream_begin_capture)(self.0.raw, mode) };
        api.check(code, "starting to record a graph")?;
        let mut recording = Recording { stream: self, running: true };
        // The first thing that failed is the reason; the rest follows from it.
        record(self).map_err(|e| e.with_context("recording a graph"))?;
        let (code, raw) = recording.end();
        api.check(code, "recording a graph")?;
        if raw.is_null() {
            return Err(Error::bug("recording a graph gave none"));
        }
        Ok(Graph(Arc::new(Inner { gpu: gpu.clone(), raw })))
    }
}

impl Graph {
    /// Makes it ready to be launched.
    pub fn instantiate(&self) -> Result<GraphExec> {
        let gpu = &self.0.gpu;
        gpu.make_current()?;
        let mut raw = null_mut();
        // SAFETY: a place for the executable graph, and a graph.
        let code = unsafe { (gpu.0.api.graph_instantiate)(&mut raw, self.0.raw, 0) };
        gpu.0.api.check(code, "making a graph ready")?;
        Ok(GraphExec { graph: self.clone(), raw })
    }

    /// The kernels, in the driver's order of nodes: that of recording, as far as is known (the
    /// driver promises none, so tell nodes apart by [`KernelNode::name`]).
    pub fn kernel_nodes(&self) -> Result<Vec<KernelNode>> {
        const ASKING: &str = "asking for a graph's nodes";
        let api = self.0.gpu.0.api;
        self.0.gpu.make_current()?;
        let mut count = 0;
        // SAFETY: without a list only the count is given.
        let code = unsafe { (api.graph_get_nodes)(self.0.raw, null_mut(), &mut count) };
        api.check(code, ASKING)?;
        let mut nodes = vec![null_mut(); count];
        if count > 0 {
            // SAFETY: room for as many as the driver said.
            let code = unsafe { (api.graph_get_nodes)(self.0.raw, nodes.as_mut_ptr(), &mut count) };
            api.check(code, ASKING)?;
        }
        let mut found = Vec::new();
        for raw in nodes {
            let mut kind: c_int = -1;
            // SAFETY: a node of this graph, and a place for its kind (an int).
            let code = unsafe { (api.graph_node_get_type)(raw, &mut kind) };
            api.check(code, ASKING)?;
            if kind == sys::CUgraphNodeType::CU_GRAPH_NODE_TYPE_KERNEL as c_int {
                found.push(KernelNode { graph: self.clone(), raw, name: self.name_of(raw)? });
            }
        }
        Ok(found)
    }

    fn name_of(&self, node: sys::CUgraphNode) -> Result<String> {
        const ASKING: &str = "asking for a kernel's name";
        let api = self.0.gpu.0.api;
        let mut params = MaybeUninit::<sys::CUDA_KERNEL_NODE_PARAMS>::zeroed();
        // SAFETY: a kernel node, and a place for its parameters.
        let code = unsafe { (api.graph_kernel_node_get_params)(node, params.as_mut_ptr()) };
        api.check(code, ASKING)?;
        // SAFETY: filled in by the driver, and zeroed before; pointers and numbers only.
        let function = unsafe { params.assume_init() }.func;
        let mut name: *const c_char = std::ptr::null();
        // SAFETY: a place for the name, and the function of a node (a null one is refused).
        let code = unsafe { (api.func_get_name)(&mut name, function) };
        api.check(code, ASKING)?;
        if name.is_null() {
            return Ok(String::new());
        }
        // SAFETY: a zero-terminated text that lives as long as the module.
        Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = self.gpu.make_current();
        // SAFETY: our graph; nodes and executable graphs keep it alive, so none is left.
        let _ = unsafe { (self.gpu.0.api.graph_destroy)(self.raw) };
    }
}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Graph({:?})", self.0.gpu)
    }
}

/// A kernel of a graph.
#[derive(Clone)]
pub struct KernelNode {
    graph: Graph,
    raw: sys::CUgraphNode,
    name: String,
}

// SAFETY: a handle that the graph keeps alive; it is only read.
unsafe impl Send for KernelNode {}
// SAFETY: as above.
unsafe impl Sync for KernelNode {}

impl KernelNode {
    /// The kernel's name in its module.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for KernelNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KernelNode({})", self.name)
    }
}

/// A graph that is ready to be launched.
pub struct GraphExec {
    /// Its nodes name the kernels that `set_kernel` changes.
    graph: Graph,
    raw: sys::CUgraphExec,
}

// SAFETY: a handle, usable on any thread; changes need `&mut`.
unsafe impl Send for GraphExec {}
// SAFETY: as above. Launches of one graph from several threads are put in order by the driver's own
// lock on the streams; a graph never runs beside itself.
unsafe impl Sync for GraphExec {}

impl GraphExec {
    /// Puts all of it into the stream, and returns at once: one call of the driver.
    ///
    /// # Safety
    /// What [`PreparedLaunch::launch`] asks for holds for every recorded launch, now and until this
    /// run is done: buffers and modules are alive, and other streams keep away from them.
    #[inline]
    pub unsafe fn launch(&self, stream: &Stream) -> Result<()> {
        let gpu = stream.gpu();
        if !gpu.is(&self.graph.0.gpu) {
            return stream.same_gpu(&self.graph.0.gpu);
        }
        gpu.0.ensure_current()?;
        // SAFETY: an executable graph and a stream of one device; the rest is the caller's promise.
        let code = unsafe { (gpu.0.api.graph_launch)(self.raw, stream.0.raw) };
        gpu.0.api.check(code, "launching a graph")
    }

    /// Takes over the arguments and grids of a graph with the same structure. The error says what
    /// differs; then nothing has changed, and a new instance must be made.
    pub fn update(&mut self, graph: &Graph) -> Result<()> {
        let gpu = &self.graph.0.gpu;
        if !gpu.is(&graph.0.gpu) {
            return Err(Error::bug("a graph was updated with one of another device"));
        }
        gpu.make_current()?;
        let mut info = UpdateResult { result: 0, node: null_mut(), from_node: null_mut() };
        // SAFETY: an executable graph, borrowed exclusively, a graph, and a place for the result.
        let result = unsafe { (gpu.0.api.graph_exec_update)(self.raw, graph.0.raw, &mut info) };
        if result == code::GRAPH_EXEC_UPDATE_FAILURE {
            let error = gpu.0.api.error(result, "updating a graph");
            return Err(error.with_note(update_reason(info.result)));
        }
        gpu.0.api.check(result, "updating a graph")
    }

    /// Gives a kernel of the graph other arguments, another grid or, within the driver's limits,
    /// another function. The cluster and the attributes stay those of the recording. Runs that are
    /// under way are not affected.
    ///
    /// The node is one of the graph that this was made from.
    pub fn set_kernel(&mut self, node: &KernelNode, launch: &PreparedLaunch) -> Result<()> {
        let gpu = &self.graph.0.gpu;
        if !Arc::ptr_eq(&node.graph.0, &self.graph.0) || !gpu.is(launch.function().gpu()) {
            let message = format!("kernel {} does not belong to the graph", node.name);
            return Err(Error::bug(message));
        }
        gpu.make_current()?;
        let params = launch.node_params();
        // SAFETY: a node of this graph, and parameters whose lists are alive; the driver copies them.
        let code =
            unsafe { (gpu.0.api.graph_exec_kernel_node_set_params)(self.raw, node.raw, &params) };
        gpu.0.api.check(code, &format!("changing kernel {} of a graph", node.name))
    }
}

/// Why an update was refused: `CUgraphExecUpdateResult` of `cuda.h`.
fn update_reason(result: c_int) -> String {
    match result {
        2 => "the graphs have different nodes or dependencies".into(),
        3 => "a node is of another kind".into(),
        4 => "a node has another function, and this driver cannot change it".into(),
        5 => "a parameter changed that cannot be changed".into(),
        6 => "a node is of a kind that cannot be updated".into(),
        7 => "a function changed to one that the node cannot take".into(),
        8 => "attributes of a node changed (a cluster's size, for example)".into(),
        other => format!("the driver's reason has number {other}"),
    }
}

impl Drop for GraphExec {
    fn drop(&mut self) {
        let gpu = &self.graph.0.gpu;
        let _ = gpu.make_current();
        // SAFETY: ours, used for the last time; a run that is under way ends first.
        let _ = unsafe { (gpu.0.api.graph_exec_destroy)(self.raw) };
    }
}

impl fmt::Debug for GraphExec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GraphExec({:?})", self.graph.0.gpu)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_words() {
        assert!(update_reason(2).contains("different nodes"));
        assert!(update_reason(99).contains("99"));
    }
}
