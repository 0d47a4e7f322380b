//! `tw embed`: sentences to vectors, and the nearest ones to a query.

use crate::args::EmbedArgs;
use crate::npy;
use crate::output::Output;
use serde_json::json;
use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};
use tilewright::gpu::RunReport;
use tilewright::{Result, Tensor};
use tilewright_base::Error;
use tilewright_graph::Graph;
use tilewright_import::hf;
use tilewright_text::Tokenizer;

pub(crate) fn run(args: &EmbedArgs, output: &Output) -> Result<()> {
    let sentences = lines(&args.input)?;
    let mut queries = args.query.clone();
    if let Some(file) = &args.query_file {
        let texts = lines(file)?.into_iter();
        queries.extend(texts.map(|l| l.split('\t').next().unwrap_or_default().to_string()));
    }
    let model = hf::load_model(&args.model.model, &hf::LoadOptions::default())?;
    let graph = model.sentence_encoder()?;
    let names: Vec<String> = graph.inputs.iter().map(|&v| graph.values[v].name.clone()).collect();
    let max_tokens = usize::try_from(model.max_tokens).unwrap_or(512).max(1);
    let tokenizer = Tokenizer::open(&args.model.model, max_tokens)?;
    let start = Instant::now();
    let (runner, place) = runner(args, graph)?;
    let compile_s = start.elapsed().as_secs_f64();
    let mut encoder = Encoder {
        runner,
        names,
        tokenizer,
        batch: args.batch.max(1),
        busy: Duration::ZERO,
        report: None,
    };
    let vectors = encoder.embed(&sentences)?;
    let embed_s = encoder.busy.as_secs_f64();
    let width = vectors.first().map_or(0, Vec::len);
    let mut text = format!(
        "{} sentences to vectors of {width} in {embed_s:.3} s ({:.0} a second) on {place}; compiled in {compile_s:.3} s\n",
        sentences.len(),
        sentences.len() as f64 / embed_s.max(1e-9),
    );
    if let Some(report) = &encoder.report {
        super::gpu::warn(report);
    }
    if let Some(path) = &args.output {
        let flat: Vec<f32> = vectors.iter().flatten().copied().collect();
        npy::write(path, &Tensor::from_slice(&[vectors.len(), width], &flat)?)?;
    }
    let mut answers = Vec::new();
    for (query, vector) in queries.iter().zip(encoder.embed(&queries)?) {
        let mut scored: Vec<(f32, usize)> =
            vectors.iter().enumerate().map(|(i, v)| (dot(v, &vector), i)).collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        scored.truncate(args.top);
        // Writing to a string cannot fail.
        let _ = writeln!(text, "\n{query}");
        for (score, i) in &scored {
            let _ = writeln!(text, "  {score:.3}  {}", sentences[*i]);
        }
        let nearest: Vec<_> = scored
            .iter()
            .map(|(score, i)| json!({"score": score, "line": i + 1, "text": sentences[*i]}))
            .collect();
        answers.push(json!({"query": query, "nearest": nearest}));
    }
    let json = json!({
        "sentences": sentences.len(), "width": width, "embed_s": embed_s, "compile_s": compile_s,
        "queries": answers,
    });
    output.result(&text, &json);
    Ok(())
}

/// Lines of a text file that are not empty.
fn lines(path: &Path) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(path)
        .map_err(|e| Error::user(format!("cannot read {}: {e}", path.display())))?;
    let lines: Vec<String> =
        text.lines().map(str::trim).filter(|l| !l.is_empty()).map(String::from).collect();
    if lines.is_empty() {
        return Err(Error::user(format!("{} holds no text", path.display())));
    }
    Ok(lines)
}

/// What runs the model.
enum Runner {
    #[cfg(feature = "cpu")]
    Cpu(tilewright::Session),
    Gpu(Box<tilewright::gpu::Session>),
}

/// The model compiled, and where it runs.
fn runner(args: &EmbedArgs, graph: Graph) -> Result<(Runner, String)> {
    if super::on_gpu(&args.model)? {
        let loaded = super::gpu::load_graph(&args.model, graph)?;
        let name = loaded.machine().name.clone();
        return Ok((Runner::Gpu(Box::new(loaded.session()?)), name));
    }
    on_cpu(args, graph)
}

#[cfg(feature = "cpu")]
fn on_cpu(args: &EmbedArgs, graph: Graph) -> Result<(Runner, String)> {
    let compiled = super::compiler(&args.model)?.compile_graph(graph)?;
    Ok((Runner::Cpu(compiled.session()?), format!("{} threads", compiled.cpu().threads)))
}

#[cfg(not(feature = "cpu"))]
fn on_cpu(_: &EmbedArgs, _: Graph) -> Result<(Runner, String)> {
    Err(super::without_cpu())
}

struct Encoder {
    runner: Runner,
    names: Vec<String>,
    tokenizer: Tokenizer,
    batch: usize,
    /// Time in the tokenizer and the model.
    busy: Duration,
    /// Of the last run on a GPU.
    report: Option<RunReport>,
}

impl Encoder {
    /// One vector per text, of length 1. Texts of similar length share a batch, so that little of
    /// it is padding.
    fn embed(&mut self, texts: &[String]) -> Result<Vec<Vec<f32>>> {
        let start = Instant::now();
        let words: Vec<&str> = texts.iter().map(String::as_str).collect();
        let lengths = self.tokenizer.lengths(&words)?;
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|&i| (lengths[i], i));
        let mut vectors = vec![Vec::new(); texts.len()];
        let names: Vec<&str> = self.names.iter().map(String::as_str).collect();
        for group in order.chunks(self.batch) {
            let group_texts: Vec<&str> = group.iter().map(|&i| words[i]).collect();
            let mut named = self.tokenizer.encode(&group_texts)?.inputs(&names);
            let inputs = names
                .iter()
                .map(|n| {
                    named.remove(*n).ok_or_else(|| {
                        Error::unsupported(format!(
                            "the model takes `{n}`, which no tokenizer makes"
                        ))
                    })
                })
                .collect::<Result<Vec<Tensor>>>()?;
            let outputs = match &mut self.runner {
                #[cfg(feature = "cpu")]
                Runner::Cpu(session) => session.run(&inputs)?,
                Runner::Gpu(session) => {
                    let outputs = session.run(&inputs)?;
                    self.report = Some(session.report(&inputs)?);
                    outputs
                }
            };
            let first = outputs.first().ok_or_else(|| Error::bug("an encoder without output"))?;
            let values = first.as_slice::<f32>()?;
            let width = values.len() / group.len();
            for (row, &i) in values.chunks(width.max(1)).zip(group) {
                vectors[i] = row.to_vec();
            }
        }
        self.busy += start.elapsed();
        Ok(vectors)
    }
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
