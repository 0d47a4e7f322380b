//! Rotary position embedding: frequencies by the configuration's rule, tables, and the rotation.

use super::config::Config;
use super::layers::Net;
use serde_json::{Map, Value};
use tilewright_base::Result;
use tilewright_data::Tensor;
use tilewright_graph::ValueId;
use tilewright_layout::Dim;

/// One angle per pair of coordinates and position: `position * frequency[pair]`.
#[derive(Debug)]
pub(super) struct Rotary {
    frequencies: Vec<f64>,
}

/// The two tables, `[S, width/2]` each, in the compute type.
#[derive(Clone, Copy)]
pub(super) struct Tables {
    cos: ValueId,
    sin: ValueId,
}

/// How frequencies are stretched for contexts longer than those of the first training.
#[derive(Debug, PartialEq)]
enum Scaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low: f64, high: f64, original: f64 },
}

impl Rotary {
    /// Reads `rope_theta` and `rope_scaling`, or both in `rope_parameters` as newer files have them.
    pub(super) fn read(config: &mut Config, width: i64) -> Rotary {
        if width % 2 != 0 {
            config.problem(format!("rotary positions need heads of even width, not {width}"));
        }
        let rules = ["rope_parameters", "rope_scaling"]
            .iter()
            .find_map(|key| config.get(key))
            .and_then(Value::as_object)
            .cloned()
            .unwrap_or_default();
        let theta = match number(&rules, "rope_theta") {
            Some(theta) => theta,
            None => config.number("rope_theta", 10000.0),
        };
        if theta <= 0.0 {
            config.problem(format!("`rope_theta` is {theta}, not above 0"));
        }
        let share = number(&rules, "partial_rotary_factor")
            .unwrap_or_else(|| config.number("partial_rotary_factor", 1.0));
        if share != 1.0 {
            config.unsupported(format!(
                "rotating part of each head (`partial_rotary_factor` {share})"
            ));
        }
        let scaling = scaling(config, &rules);
        // A stated width has no relation to memory until a weight of that width was found.
        let pairs = (width / 2).min(1 << 16);
        let frequencies = (0..pairs).map(|i| scaling.apply(frequency(theta, i, width))).collect();
        Rotary { frequencies }
    }

    /// The angle of each pair at position 1.
    pub(super) fn frequencies(&self) -> &[f64] {
        &self.frequencies
    }

    /// Cosines and sines for the positions of the tokens: from the number of remembered ones on.
    ///
    /// Angles and tables are computed in `f64` from `f32` frequencies: those are what a model was
    /// trained with; an angle rounded to `f32` would be off by 2e-4 at position 4096.
    pub(super) fn tables(&self, net: &mut Net) -> Result<Tables> {
        let rows = net.most_tokens();
        let mut table = |name: &str, of: fn(f64) -> f64| -> Result<ValueId> {
            let angles = (0..rows).flat_map(|p| self.frequencies.iter().map(move |f| p as f64 * f));
            let values: Vec<f64> = angles.map(of).collect();
            let shape = [usize::try_from(rows).unwrap_or(0), self.frequencies.len()];
            let tensor = Tensor::from_f64s(net.compute, &shape, &values)?;
            let table = net.b.constant(name, tensor);
            let (past, seq) = (net.past(), net.seq.clone());
            net.b.set_origin(name);
            net.b.slice_axis(table, 0, past, seq)
        };
        Ok(Tables { cos: table("rotary.cos", f64::cos)?, sin: table("rotary.sin", f64::sin)? })
    }
}

/// Rotates `x [B,n,S,width]`: coordinate `i` and `i + width/2` are one pair.
pub(super) fn rotate(net: &mut Net, x: ValueId, tables: Tables) -> Result<ValueId> {
    let rank = net.b.shape(x).len();
    let half = net.b.shape(tables.cos)[1].clone();
    let first = net.b.slice_axis(x, rank - 1, Dim::new(0), half.clone())?;
    let second = net.b.slice_axis(x, rank - 1, half.clone(), half)?;
    let operands = [first, second, tables.cos, tables.sin];
    let low = net.b.map_text("{ x, y, c, s -> x * c - y * s }", &operands)?;
    let high = net.b.map_text("{ x, y, c, s -> y * c + x * s }", &operands)?;
    net.b.op(tilewright_graph::Op::Concat(rank - 1), &[low, high])
}

/// The unscaled frequency of pair `i`, rounded as transformers rounds it.
fn frequency(theta: f64, i: i64, width: i64) -> f64 {
    let exponent = (2 * i) as f32 / width as f32;
    f64::from(1.0 / (theta as f32).powf(exponent))
}

fn number(rules: &Map<String, Value>, key: &str) -> Option<f64> {
    rules.get(key).and_then(Value::as_f64).filter(|v| v.is_finite())
}

fn scaling(config: &mut Config, rules: &Map<String, Value>) -> Scaling {
    let kind = ["rope_type", "type"].iter().find_map(|key| rules.get(*key)).and_then(Value::as_str);
    let mut positive = |key: &str| -> f64 {
        let value = number(rules, key).unwrap_or(0.0);
        if value > 0.0 {
            return value;
        }
        config.problem(format!("rotary scaling needs `{key}` above 0"));
        1.0
    };
    match kind.unwrap_or("default") {
        "default" => Scaling::None,
        "linear" => Scaling::Linear { factor: positive("factor") },
        "llama3" => {
            let (factor, low, high) =
                (positive("factor"), positive("low_freq_factor"), positive("high_freq_factor"));
            let original = positive("original_max_position_embeddings");
            if high <= low {
                config.problem("`high_freq_factor` is not above `low_freq_factor`");
            }
            Scaling::Llama3 { factor, low, high, original }
        }
        other => {
            config.unsupported(format!("rotary scaling `{other}`"));
            Scaling::None
        }
    }
}

impl Scaling {
    fn apply(&self, frequency: f64) -> f64 {
        match *self {
            Scaling::None => frequency,
            Scaling::Linear { factor } => frequency / factor,
            Scaling::Llama3 { factor, low, high, original } => {
                let wave = std::f64::consts::TAU / frequency;
                if wave < original / high {
                    frequency
                } else if wave > original / low {
                    frequency / factor
                } else {
                    let smooth = (original / wave - low) / (high - low);
                    (1.0 - smooth) * frequency / factor + smooth * frequency
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computed by transformers' `_compute_llama3_parameters` with the values of Llama 3.1 8B.
    #[test]
    fn llama3_frequencies_are_those_of_transformers() {
        let scaling = Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 };
        let got: Vec<f64> = [0, 20, 30, 33, 40, 63]
            .iter()
            .map(|&i| scaling.apply(frequency(500000.0, i, 128)))
            .collect();
        let expected =
            [1.0, 0.01656044088, 0.001371893682, 0.00031269365, 3.4281023545e-5, 3.068925878e-7];
        for (g, e) in got.iter().zip(expected) {
            assert!((g - e).abs() <= 1e-6 * e, "{got:?}");
        }
    }
}
