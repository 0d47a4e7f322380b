//! The pipeline and the manager that runs it.
//!
//! [`PIPELINE`] is a list of groups; a group is a list of passes that is repeated until none of
//! them changes anything (or run once). After every pass that changed something the graph is
//! verified: a failure is our bug, reported with the name of the stage and the node at fault.

use crate::{
    cancel_views, cse, dead_code, decompose, fold_constants, infer_shapes, recognise, simplify,
};
use std::time::{Duration, Instant};
use tilewright_base::{Error, Kind, Result};
use tilewright_graph::{Graph, verify};

/// What passes may know about the target, as plain numbers, and their limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PassContext {
    /// Lanes of `f32` in a vector register: channels are blocked by this (16 with AVX-512, 8 with
    /// AVX2).
    pub vector_lanes: i64,
    /// Columns of a matrix micro-kernel: weights are packed in panels of this width.
    pub panel_width: i64,
    /// Constant folding makes no tensor of more bytes than this out of smaller ones.
    pub fold_limit_bytes: usize,
    /// Rounds after which a group that still changes is left.
    pub max_rounds: usize,
}

impl Default for PassContext {
    fn default() -> Self {
        PassContext { vector_lanes: 8, panel_width: 16, fold_limit_bytes: 1 << 20, max_rounds: 24 }
    }
}

/// One pass.
#[derive(Clone, Copy, Debug)]
pub struct Pass {
    /// As in `tw inspect --stage NAME`.
    pub name: &'static str,
    /// Why it stands where it stands.
    pub why: &'static str,
    /// The rewrite; true when it changed something.
    pub run: fn(&mut Graph, &PassContext) -> Result<bool>,
}

/// Passes that belong together.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// What the group achieves.
    pub name: &'static str,
    /// Repeat until nothing changes.
    pub until_stable: bool,
    /// In this order.
    pub passes: &'static [Pass],
}

/// The whole pipeline; read it aloud.
pub const PIPELINE: &[Group] = &[
    Group {
        name: "clean",
        until_stable: true,
        passes: &[
            Pass {
                name: "infer-shapes",
                why: "first, so that sizes that must be equal have one name in all later patterns",
                run: infer_shapes::run,
            },
            Pass {
                name: "fold-constants",
                why: "shape arithmetic and literals of the frontend become plain constants",
                run: fold_constants::run,
            },
            Pass {
                name: "simplify",
                why: "after folding: constants become literals, no-ops and chains of views vanish",
                run: simplify::run,
            },
            Pass {
                name: "cse",
                why: "after simplification, which makes equal things look equal",
                run: cse::run,
            },
            Pass {
                name: "dead-code",
                why: "what the rewrites left behind must not count as a reader",
                run: dead_code::run,
            },
        ],
    },
    Group {
        name: "views",
        until_stable: true,
        passes: &[
            Pass {
                name: "cancel-views",
                why: "permutes and reshapes sink until they meet their inverse or a contraction \
                      that takes them as letters",
                run: cancel_views::run,
            },
            Pass {
                name: "simplify-views",
                why: "joins the views that have met",
                run: simplify::run,
            },
            Pass {
                name: "cse-views",
                why: "equal work behind different views has become equal",
                run: cse::run,
            },
        ],
    },
    Group {
        name: "recognise",
        until_stable: true,
        passes: &[
            Pass {
                name: "recognise",
                why: "patterns are looked for once all noise between their parts is gone",
                run: recognise::run,
            },
            Pass {
                name: "fold-recognised",
                why: "weights that took a normalisation or scale become constants again",
                run: fold_constants::run,
            },
            Pass {
                name: "cancel-recognised",
                why: "views around what was recognised meet each other",
                run: cancel_views::run,
            },
            Pass { name: "simplify-recognised", why: "and join", run: simplify::run },
        ],
    },
    Group {
        name: "decompose",
        until_stable: true,
        passes: &[
            Pass {
                name: "decompose",
                why: "last of the rewrites: what no kernel takes whole is written in the core",
                run: decompose::run,
            },
            Pass {
                name: "fold-decomposed",
                why: "arithmetic on the weights of what was decomposed is done now",
                run: fold_constants::run,
            },
            Pass { name: "simplify-decomposed", why: "tidies the result", run: simplify::run },
            Pass {
                name: "cse-decomposed",
                why: "so that fusion sees each computation once",
                run: cse::run,
            },
            Pass {
                name: "dead-code-final",
                why: "nothing unused reaches lowering",
                run: dead_code::run,
            },
        ],
    },
];

/// The pass of this name.
pub fn find_pass(name: &str) -> Option<&'static Pass> {
    PIPELINE.iter().flat_map(|g| g.passes).find(|p| p.name == name)
}

/// How long a stage took, over all its rounds.
#[derive(Clone, Debug)]
pub struct StageTime {
    /// The pass.
    pub name: &'static str,
    /// Times it ran.
    pub rounds: usize,
    /// Times it changed something.
    pub changes: usize,
    /// In the pass itself.
    pub time: Duration,
    /// In the verifier after it.
    pub verify_time: Duration,
}

/// What [`run`] tells.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// One per pass, in pipeline order.
    pub stages: Vec<StageTime>,
    /// Groups that still changed in their last round: harmless, and worth a look.
    pub unstable: Vec<&'static str>,
}

/// Called after each run of a pass with its name and the graph as it is then. In a repeated group
/// the last call of a name shows the stage's final state.
pub type Observer<'a> = &'a mut dyn FnMut(&'static str, &Graph);

/// Runs [`PIPELINE`].
pub fn run(graph: &mut Graph, ctx: &PassContext) -> Result<Report> {
    run_observed(graph, ctx, PIPELINE, &mut |_, _| {})
}

/// Runs any pipeline and shows the graph after each pass.
pub fn run_observed(
    graph: &mut Graph,
    ctx: &PassContext,
    pipeline: &[Group],
    observer: Observer<'_>,
) -> Result<Report> {
    let mut report = Report::default();
    for group in pipeline {
        let first = report.stages.len();
        for pass in group.passes {
            report.stages.push(StageTime {
                name: pass.name,
                rounds: 0,
                changes: 0,
                time: Duration::ZERO,
                verify_time: Duration::ZERO,
            });
        }
        let rounds = if group.until_stable { ctx.max_rounds.max(1) } else { 1 };
        for round in 0..rounds {
            let mut any = false;
            for (i, pass) in group.passes.iter().enumerate() {
                let stage = &mut report.stages[first + i];
                any |= step(graph, ctx, pass, stage)?;
                observer(pass.name, graph);
            }
            if !any {
                break;
            }
            if group.until_stable && round + 1 == rounds {
                report.unstable.push(group.name);
            }
        }
    }
    Ok(report)
}

fn step(graph: &mut Graph, ctx: &PassContext, pass: &Pass, stage: &mut StageTime) -> Result<bool> {
    let start = Instant::now();
    let outcome = (pass.run)(graph, ctx);
    stage.time += start.elapsed();
    stage.rounds += 1;
    let changed = outcome.map_err(|e| blame(pass.name, e))?;
    if changed {
        stage.changes += 1;
        let start = Instant::now();
        let verdict = verify(graph);
        stage.verify_time += start.elapsed();
        verdict.map_err(|e| blame(pass.name, e))?;
    }
    Ok(changed)
}

/// The graph was right before the pass, so whatever goes wrong in it is our bug.
fn blame(stage: &str, error: Error) -> Error {
    let error = match error.kind() {
        Kind::Bug => error,
        _ => {
            let mut bug = Error::bug(error.to_string());
            for note in error.notes() {
                bug = bug.with_note(note.clone());
            }
            bug
        }
    };
    error.with_context(format!("after pass `{stage}`"))
}
