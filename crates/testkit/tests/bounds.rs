//! The running error bounds: wide enough for a plain evaluation in the model's types, and no wider.

use tilewright_base::DType;
use tilewright_data::Tensor;
use tilewright_graph::Graph;
use tilewright_interp::graph::{Mode, Options, run_with};
use tilewright_testkit::{bound, data, generate};

#[test]
fn bounds_hold_and_are_tight() {
    let (mut elements, mut open, mut outputs, mut caught) = (0usize, 0usize, 0, 0);
    for seed in 0..300 {
        let g = generate::graph(seed, &generate::Options::default());
        let mut rng = data::Rng::new(seed);
        let env = data::random_env(&g, &mut rng);
        let inputs = data::random_inputs(&g, &env, &mut rng);
        let run = |mode| run_with(&g, &inputs, &Options { env: env.clone(), ..Options::new(mode) });
        let exact = run(Mode::Exact).unwrap_or_else(|e| panic!("seed {seed}: {e:?}"));
        let want =
            bound::run(&g, &inputs, &env).unwrap_or_else(|e| panic!("seed {seed}: {e:?}\n{g}"));
        for (i, got) in exact.outputs.iter().enumerate() {
            let c = bound::check(got, &want.outputs[i], &want.errors[i]);
            assert!(c.passed(), "seed {seed}, output {i}: {c}\n{g}");
            elements += got.len();
            open += want.errors[i].iter().filter(|e| e.is_infinite()).count();
            if got.dtype() != DType::F32 || got.is_empty() {
                continue;
            }
            // An error of 200 units in the last place of the output's size, somewhere.
            let mut values: Vec<f64> = (0..got.len()).map(|j| got.get_f64(j)).collect();
            let scale = values.iter().map(|x| x * x).sum::<f64>() / values.len() as f64;
            let at = rng.below(values.len());
            values[at] += 200.0 * 2f64.powi(-23) * (scale.sqrt() + values[at].abs());
            let wrong = Tensor::from_f64s(DType::F32, got.shape(), &values).unwrap();
            outputs += 1;
            caught +=
                usize::from(!bound::check(&wrong, &want.outputs[i], &want.errors[i]).passed());
        }
    }
    println!("{open} of {elements} elements without a bound; {caught} of {outputs} errors caught");
    assert!(open * 50 <= elements, "{open} of {elements} elements have no bound");
    assert!(caught * 10 >= outputs * 9, "{caught} of {outputs} small errors were caught");
}

/// `(c - x) + x` keeps the roundings of `x`, though the result may be tiny.
#[test]
fn a_difference_is_allowed_the_roundings_of_its_terms_only() {
    let text = "graph @g {\n  %0 \"x\": f32[4] = input\n  %1: f32[] = const [0.001]\n  \
                %2: f32[4] = map { c, x -> c - x } %1, %0\n  %3: f32[4] = map { a, b -> a + b } %2, %0\n  \
                return \"y\": %3\n}\n";
    let g = Graph::parse(text).unwrap_or_else(|e| panic!("{e:?}"));
    let x = Tensor::from_slice(&[4], &[1f32, 2., 4., 0.001]).unwrap();
    let bounds = bound::run(&g, &[x], &Default::default()).unwrap().errors.remove(0);
    let u = 2f64.powi(-24);
    for (e, x) in bounds.iter().zip([1.0, 2.0, 4.0, 0.001]) {
        // Two roundings of the difference, two of the sum, one to write it.
        let least = 2.0 * u * (x - 0.001f64).abs();
        assert!(*e >= least && *e <= least + 4.0 * u * 0.001, "{e:e} for {x}, {least:e}");
    }
}
