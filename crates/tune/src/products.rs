//! The space of a matrix product as the search sees it: the whole of what `gemm::choices` lists, each choice a point
//! whose levels are its knobs.

use crate::search::{Point, Space};
use std::collections::BTreeSet;
use tilewright_base::Result;
use tilewright_kernels::gemm::{Choice, Knobs, Problem, choices, picked};
use tilewright_target::Gpu;

/// A product's choices, best first by the model, and the same as a space.
#[derive(Debug)]
pub struct Products {
    /// Choice `i` is point `i`.
    pub choices: Vec<Choice>,
    /// The names of the choices.
    pub knobs: Vec<Knobs>,
    /// For the search.
    pub space: Space,
    /// The point that the model picks, if its pick comes from the space.
    pub picked: Option<usize>,
}

impl Products {
    /// The whole legal space of a problem.
    ///
    /// # Errors
    /// As `gemm::choices`.
    pub fn new(problem: &Problem, gpu: &Gpu) -> Result<Products> {
        let mut choices = choices(problem, gpu)?;
        let mut seen = BTreeSet::new();
        choices.retain(|c| seen.insert(Knobs::of(c)));
        let knobs: Vec<Knobs> = choices.iter().map(Knobs::of).collect();
        let axes: Vec<Vec<Key>> = knobs.iter().map(keys).collect();
        let width = axes.first().map_or(0, Vec::len);
        let ranks: Vec<BTreeSet<&Key>> =
            (0..width).map(|axis| axes.iter().map(|keys| &keys[axis]).collect()).collect();
        let ranks: Vec<Vec<&Key>> = ranks.into_iter().map(|r| r.into_iter().collect()).collect();
        let level =
            |axis: usize, key: &Key| ranks[axis].binary_search(&key).map_or(0, |rank| rank as u32);
        let points = choices.iter().zip(&axes).map(|(choice, keys)| Point {
            estimate: choice.estimate_us,
            levels: keys.iter().enumerate().map(|(axis, key)| level(axis, key)).collect(),
        });
        let space = Space::new(points.collect())?;
        let first = picked(problem, gpu)?.map(|c| Knobs::of(&c));
        let picked = first.and_then(|first| knobs.iter().position(|k| *k == first));
        Ok(Products { choices, knobs, space, picked })
    }

    /// The point of this name.
    pub fn named(&self, knobs: &Knobs) -> Option<usize> {
        self.knobs.iter().position(|k| k == knobs)
    }
}

/// Where a choice stands along one axis of the space.
type Key = [i64; 5];

/// The axes of a choice: what is a matter of more or less has an axis of its own; how blocks are made up is one.
fn keys(k: &Knobs) -> Vec<Key> {
    let [bm, bn, bk] = k.tile;
    let word = |text: &str, of: &str| i64::from(text == of);
    let [rows, cols] = k.warps.map(i64::from);
    vec![
        [i64::from(k.swapped), 0, 0, 0, 0],
        [k.splits, 0, 0, 0, 0],
        [bm, i64::from(k.consumers), word(&k.mode, "ping-pong"), rows, cols],
        [bn, 0, 0, 0, 0],
        [bk, 0, 0, 0, 0],
        [i64::from(k.cluster), k.cluster_axis as i64, 0, 0, 0],
        // Stages of tensor-core kernels follow from the rest.
        [i64::from(k.store_slots), if k.product == "wgmma" { 0 } else { k.stages.into() }, 0, 0, 0],
        [i64::from(k.raster), word(&k.store, "tma"), i64::from(k.vector), 0, 0],
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use tilewright_base::DType;
    use tilewright_kernels::gemm::{Order, Precision, candidate, plan_untuned};

    fn problems() -> Vec<(&'static str, Problem)> {
        let dense = |m, n, k| Problem::dense(m, n, k, DType::BF16, DType::BF16);
        let mut batched = dense(512, 64, 512);
        batched.batch = 64;
        let mut f32 = Problem::dense(512, 512, 512, DType::F32, DType::F32);
        let plain = f32.clone();
        f32.precision = Precision::Tf32;
        vec![
            ("square", dense(1000, 1000, 1000)),
            ("deep", dense(256, 256, 65536)),
            ("few rows", dense(64, 8192, 8192).ordered(Order::Row, Order::Col, Order::Row)),
            ("batched", batched),
            ("tf32", f32),
            ("f32", plain),
        ]
    }

    #[test]
    fn the_space_is_whole_and_holds_the_pick() {
        let gpu = Gpu::h200();
        for (name, problem) in problems() {
            let products = Products::new(&problem, &gpu).unwrap();
            println!("{name}: {} choices", products.choices.len());
            let least = if name == "f32" { 50 } else { 1500 };
            assert!(products.space.len() >= least, "{name}: {}", products.space.len());
            let picked = products.picked.unwrap();
            let made = candidate(&problem, &products.choices[picked]).unwrap().unwrap();
            let plan = &plan_untuned(&problem, &gpu, 1).unwrap()[0];
            let text = |c: &tilewright_kernels::gemm::Candidate| format!("{:?}", c.steps);
            assert_eq!(text(&made), text(plan), "{name}");
            assert!(products.space.neighbours(picked).len() > 4, "{name}");
            let last = products.knobs.last().unwrap();
            assert_eq!(products.named(last), Some(products.space.len() - 1));
        }
    }
}
