//! Comparison with tolerances, random programs and a minimiser, for tests.
//!
//! | module | what |
//! |---|---|
//! | [`compare`] | got against oracle: counts, first coordinate, worst error as multiple of the budget |
//! | [`budget`] | how much error a graph's values may have, from its operators |
//! | [`data`] | seeded numbers, tensors, inputs and sizes for a graph |
//! | [`generate`] | random graphs |
//! | [`shrink`] | the smallest graph that still fails |
//! | [`fuzz`] | bounded fuzzing of parsers |
//! | [`golden`] | text files with input and expected output side by side |
//!
//! Typical use, a differential test of something that runs graphs:
//!
//! ```
//! use tilewright_interp::{Mode, Options, graph::run_with};
//! use tilewright_testkit::{budget, compare::compare, data, generate, shrink};
//!
//! let differs = |g: &tilewright_graph::Graph| -> bool {
//!     let mut rng = data::Rng::new(7);
//!     let env = data::random_env(g, &mut rng);
//!     let inputs = data::random_inputs(g, &env, &mut rng);
//!     let run = |mode| run_with(g, &inputs, &Options { env: env.clone(), ..Options::new(mode) });
//!     let (Ok(got), Ok(want)) = (run(Mode::Exact), run(Mode::F64)) else { return true };
//!     let budgets = budget::of_outputs(g);
//!     let pairs = got.outputs.iter().zip(&want.outputs).zip(&budgets);
//!     pairs.into_iter().any(|((got, want), budget)| !compare(got, want, budget).passed())
//! };
//! let g = generate::graph(1, &generate::Options::default());
//! assert!(!differs(&g), "{}", shrink::shrink(&g, differs));
//! ```

pub mod bound;
pub mod budget;
pub mod compare;
pub mod data;
pub mod fuzz;
pub mod generate;
pub mod golden;
pub mod shrink;
