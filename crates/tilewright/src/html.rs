//! The report of `tw explain --html`: one page that needs nothing from outside itself.
//!
//! [`page`] and [`gpu_page`] say what a report has to show; `write` names the sections in the order of the page, and
//! each is one function. Text goes through
//! `maud`, which escapes it; the style sheet and the script lie beside this file and hold no data.

use crate::explain::{Explanation, KernelReport, bytes_text, time_text};
use crate::gpu::GpuExplanation;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use std::collections::BTreeMap;
use std::ops::Range;

/// Up to this many kernels all boxes are open to the eye; larger models start folded by section.
const UNFOLDED_MAX: usize = 40;

/// Ceilings of the machine.
struct Roofs {
    flops_per_s: f64,
    /// A lower ceiling, and what it is of.
    lower: Option<(f64, &'static str)>,
    bytes_per_s: f64,
    /// What there is to say about them.
    note: Option<Markup>,
}

/// What a page shows.
struct Report<'a> {
    model: &'a str,
    machine: String,
    sizes: &'a [(String, i64)],
    /// Figures of the heading, with what they are.
    tiles: Vec<(String, String)>,
    kernels: Vec<&'a KernelReport>,
    /// For each kernel, what more there is to say: terms and their text.
    details: Vec<Vec<(&'static str, String)>>,
    roofs: Roofs,
    memory: Vec<(&'static str, usize)>,
    stages: &'a [(String, f64)],
}

/// The page of a model on a CPU.
pub fn page(e: &Explanation) -> String {
    let (c, m) = (&e.cpu.ceilings, &e.memory);
    let flops: f64 = e.kernels.iter().map(|k| k.flops).sum();
    let saved: f64 = e.kernels.iter().map(|k| k.bytes_saved).sum();
    let smaller = m.naive_bytes as f64 / (m.arena_bytes.max(1)) as f64;
    let threads = if e.cpu.threads == 1 { "thread" } else { "threads" };
    let arena = match m.naive_bytes {
        0 => "of intermediates".to_string(),
        _ => format!("of intermediates, {smaller:.1} times less than naive"),
    };
    let count =
        format!("kernels ({} distinct) for {} operators", e.distinct_kernels, e.operators_before);
    let rate = format!("{:.1} GFLOP/s", flops * 1e-9 / e.seconds.max(1e-12));
    write(&Report {
        model: &e.model,
        machine: format!(
            "{}, {} {threads}, vectors of {} bits",
            e.cpu.name, e.cpu.threads, e.cpu.vector_bits
        ),
        sizes: &e.sizes,
        tiles: vec![
            (time_text(e.seconds), "sum of the kernels' times".to_string()),
            (e.kernels.len().to_string(), count),
            (rate, format!("{} in all", flops_text(flops))),
            (bytes_text(saved), "kept out of memory by fusion".to_string()),
            (bytes_text(m.arena_bytes as f64), arena),
        ],
        kernels: e.kernels.iter().collect(),
        details: Vec::new(),
        roofs: Roofs {
            flops_per_s: c.f32_flops_per_s,
            lower: (e.cpu.threads > 1).then_some((c.f32_flops_per_s_1_thread, "1 thread")),
            bytes_per_s: c.memory_read_bytes_per_s,
            note: (!c.measured).then(
                || html! { " The ceilings are guesses: run " code { "tw machine --measure" } "." },
            ),
        },
        memory: vec![
            ("intermediates, naive", m.naive_bytes),
            ("intermediates, arena", m.arena_bytes),
            ("weights in place", m.shared_constant_bytes),
            ("weights packed", m.packed_constant_bytes),
            ("scratch of all threads", m.scratch_bytes),
        ],
        stages: &e.stages,
    })
}

/// The page of a model on a GPU.
pub fn gpu_page(e: &GpuExplanation) -> String {
    let reports = || e.steps.iter().map(|s| &s.report);
    let flops: f64 = reports().map(|k| k.flops).sum();
    let saved: f64 = reports().map(|k| k.bytes_saved).sum();
    let [weights, arena, workspace, naive, apart] = e.memory_bytes;
    let details = |s: &crate::gpu::GpuStep| {
        let mut out = vec![("instead of", s.library.clone())];
        out.extend(s.schedules.iter().map(|text| ("program", text.clone())));
        out.extend(s.host.iter().map(|why| ("on the host", why.clone())));
        out
    };
    let hosts = e.steps.iter().filter(|s| s.host.is_some()).count();
    write(&Report {
        model: &e.model,
        machine: format!("{}, {}", e.gpu, e.precision),
        sizes: &e.sizes,
        tiles: vec![
            (
                time_text(e.run_seconds),
                format!("a run; its steps one by one {}", time_text(e.seconds)),
            ),
            (
                e.launches.to_string(),
                format!("launches in {} graphs, {hosts} steps on the host", e.graphs),
            ),
            (
                format!("{:.1} TFLOP/s", flops * 1e-12 / e.run_seconds.max(1e-12)),
                format!("{} in all", flops_text(flops)),
            ),
            (bytes_text(saved), "kept out of memory by fusion".to_string()),
            (
                bytes_text((weights + arena + workspace) as f64),
                format!(
                    "of memory; tensor by tensor at least {}",
                    bytes_text(e.framework_bytes as f64)
                ),
            ),
        ],
        kernels: reports().collect(),
        details: e.steps.iter().map(details).collect(),
        roofs: Roofs {
            flops_per_s: e.flops_per_s[0],
            lower: (e.flops_per_s[1] < e.flops_per_s[0])
                .then_some((e.flops_per_s[1], "multiply-adds")),
            bytes_per_s: e.bytes_per_s,
            note: None,
        },
        memory: vec![
            ("intermediates, naive", naive),
            ("intermediates, none over another", apart),
            ("intermediates, arena", arena),
            ("weights", weights),
            ("workspace of the kernels", workspace),
        ],
        stages: &e.stages,
    })
}

fn write(e: &Report<'_>) -> String {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { (e.model) " - Tilewright" }
                style { (PreEscaped(include_str!("html/page.css"))) }
            }
            body {
                main {
                    (header(e))
                    (kinds(e))
                    (roofline(e))
                    (flow(e))
                    (table(e))
                    (memory(e))
                    (stages(e))
                    footer { "Written by " code { "tw explain --html" } " (Tilewright " (env!("CARGO_PKG_VERSION")) ")." }
                }
                script { (PreEscaped(include_str!("html/page.js"))) }
            }
        }
    }
    .into_string()
}

fn header(e: &Report<'_>) -> Markup {
    let sizes: Vec<String> = e.sizes.iter().map(|(name, n)| format!("{name} = {n}")).collect();
    html! {
        h1 { (e.model) }
        p {
            (e.machine)
            @if !sizes.is_empty() { " · " (sizes.join(", ")) }
        }
        div.tiles {
            @for (value, what) in &e.tiles { (tile(value, what)) }
        }
    }
}

fn tile(value: &str, what: &str) -> Markup {
    html! { div.tile { b { (value) } span { (what) } } }
}

fn flops_text(flops: f64) -> String {
    match flops {
        f if f >= 1e9 => format!("{:.2} GFLOP", f * 1e-9),
        f if f >= 1e6 => format!("{:.1} MFLOP", f * 1e-6),
        f => format!("{:.1} kFLOP", f * 1e-3),
    }
}

/// Class that colours a kind of kernel.
fn class(anchor: &str) -> &'static str {
    match anchor {
        "contract" => "k-contract",
        "conv" => "k-conv",
        "attention" => "k-attention",
        "rows" => "k-rows",
        "map" => "k-map",
        "host" => "k-host",
        _ => "k-other",
    }
}

fn percent(share: f64) -> String {
    format!("{:.1}%", share * 100.0)
}

fn kinds(e: &Report<'_>) -> Markup {
    let mut by_kind: BTreeMap<&str, (usize, f64)> = BTreeMap::new();
    for k in &e.kernels {
        let sum = by_kind.entry(&k.anchor).or_default();
        *sum = (sum.0 + 1, sum.1 + k.share);
    }
    let mut kinds: Vec<(&str, (usize, f64))> = by_kind.into_iter().collect();
    kinds.sort_by(|a, b| b.1.1.total_cmp(&a.1.1));
    html! {
        h2 { "Where the time goes" }
        p { "By what the kernels are built around." }
        div.card {
            div.mix {
                @for (kind, (_, share)) in &kinds {
                    i class=(class(kind)) style=(format!("flex: {share:.5} 1 0")) title=(format!("{kind}: {}", percent(*share))) {}
                }
            }
            div.legend {
                @for (kind, (count, share)) in &kinds {
                    span { i.dot.(class(kind)) {} (kind) " " (percent(*share)) ", " (count) @if *count == 1 { " kernel" } @else { " kernels" } }
                }
            }
        }
    }
}

/// A logarithmic axis between powers of ten.
struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// Covers all values, at least two decades.
    fn around(values: impl Iterator<Item = f64>, from: f64, to: f64) -> Axis {
        let (mut low, mut high) = (f64::INFINITY, f64::NEG_INFINITY);
        for v in values.filter(|v| v.is_finite() && *v > 0.0) {
            (low, high) = (low.min(v.log10().floor()), high.max(v.log10().ceil()));
        }
        if !(low.is_finite() && high.is_finite()) {
            (low, high) = (0.0, 2.0);
        }
        Axis { low, high: high.max(low + 2.0), from, to }
    }

    fn at(&self, v: f64) -> f64 {
        let part = (v.log10() - self.low) / (self.high - self.low);
        self.from + part * (self.to - self.from)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> {
        (self.low as i32..=self.high as i32).map(|p| 10f64.powi(p))
    }
}

fn tick_text(v: f64) -> String {
    if v >= 1.0 { format!("{v:.0}") } else { format!("{v}") }
}

fn roofline(e: &Report<'_>) -> Markup {
    let (peak, bandwidth) = (e.roofs.flops_per_s, e.roofs.bytes_per_s);
    let shown = |k: &&&KernelReport| k.flops > 0.0 && k.bytes > 0.0 && k.seconds > 0.0;
    let points: Vec<&KernelReport> = e.kernels.iter().filter(shown).copied().collect();
    let intensity = |k: &KernelReport| k.flops / k.bytes;
    let rate = |k: &KernelReport| k.flops / k.seconds;
    let ridge = peak / bandwidth;
    let x = Axis::around(
        points.iter().map(|k| intensity(k)).chain([ridge / 10.0, ridge * 3.0]),
        70.0,
        990.0,
    );
    let y = Axis::around(
        points.iter().map(|k| rate(k) * 1e-9).chain([peak * 1e-9, peak * 1e-11]),
        400.0,
        24.0,
    );
    let (left, right) = (10f64.powf(x.low), 10f64.powf(x.high));
    let bottom = 10f64.powf(y.low);
    // A ceiling as a path: the slope of a bandwidth from where it enters the plot up to a rate.
    let slope = |bytes_per_s: f64, top: f64| {
        let start = left.max(bottom * 1e9 / bytes_per_s);
        let knee = (top / bytes_per_s).clamp(start, right);
        format!(
            "M{:.1} {:.1} L{:.1} {:.1} L{:.1} {:.1}",
            x.at(start),
            y.at((start * bytes_per_s).min(top) * 1e-9),
            x.at(knee),
            y.at((knee * bytes_per_s).min(top) * 1e-9),
            x.at(right),
            y.at((right * bytes_per_s).min(top) * 1e-9),
        )
    };
    let hidden = e.kernels.len() - points.len();
    let hidden_share: f64 =
        e.kernels.iter().filter(|k| k.flops <= 0.0 || k.bytes <= 0.0).map(|k| k.share).sum();
    let mut drawn = points.clone();
    // Small dots last, on top.
    drawn.sort_by(|a, b| b.share.total_cmp(&a.share));
    html! {
        h2 { "Roofline" }
        p {
            "Each dot is a kernel, its area the share of the time. Below the slope a kernel could gain by moving less "
            "data, below the flat line by computing faster. Bytes count traffic to main memory, so data that stays in the caches can lie above the slope."
            @if let Some(note) = &e.roofs.note { (note) }
        }
        div.card {
            svg viewBox="0 0 1010 450" role="img" aria-label="Roofline plot" {
                @for t in x.ticks() {
                    line.grid x1=(x.at(t)) x2=(x.at(t)) y1="24" y2="400" {}
                    text x=(x.at(t)) y="418" text-anchor="middle" { (tick_text(t)) }
                }
                @for t in y.ticks() {
                    line.grid x1="70" x2="990" y1=(y.at(t)) y2=(y.at(t)) {}
                    text x="62" y=(y.at(t) + 4.0) text-anchor="end" { (tick_text(t)) }
                }
                text x="530" y="442" text-anchor="middle" { "FLOP per byte" }
                text x="70" y="14" { "GFLOP/s" }
                @if let Some((one, _)) = e.roofs.lower { path.roof.thin d=(slope(bandwidth, one)) {} }
                path.roof d=(slope(bandwidth, peak)) {}
                text x="984" y=(y.at(peak * 1e-9) - 7.0) text-anchor="end" {
                    (format!("{:.0} GFLOP/s, {:.1} GB/s", peak * 1e-9, bandwidth * 1e-9))
                }
                @if let Some((one, what)) = e.roofs.lower.filter(|(one, _)| x.at(one / bandwidth) < 900.0) {
                    text x="984" y=(y.at(one * 1e-9) - 5.0) text-anchor="end" { (format!("{what}: {:.0} GFLOP/s", one * 1e-9)) }
                }
                @for k in &drawn {
                    circle.point.(class(&k.anchor)) data-k=(format!("k{}", k.step))
                        cx=(format!("{:.1}", x.at(intensity(k)))) cy=(format!("{:.1}", y.at(rate(k) * 1e-9)))
                        r=(format!("{:.1}", (3.5 + 46.0 * (k.share / std::f64::consts::PI).sqrt()).min(26.0))) {
                        title {
                            (format!("{}: {}: {:.2} GFLOP/s at {:.2} FLOP/byte, {} ({} of the time), {:.0}% of the {} ceiling",
                                k.step, k.label, rate(k) * 1e-9, intensity(k), time_text(k.seconds), percent(k.share), k.fraction * 100.0, k.roof.name()))
                        }
                    }
                }
            }
            p #said { "Point at a dot to see which kernel it is." }
            @if hidden > 0 {
                p { (hidden) " kernels without arithmetic or data (copies, lookups; " (percent(hidden_share)) " of the time) have no place here." }
            }
        }
    }
}

/// The part of a node's name that names its layer: everything to the first number, `/encoder/layer.0`
/// of `/encoder/layer.0/attention/MatMul`.
fn scope(k: &KernelReport) -> Option<&str> {
    let name = k.nodes.first()?;
    let from = name.find(|c: char| c.is_ascii_digit())?;
    let rest = &name[from..];
    let digits = rest.find(|c: char| !c.is_ascii_digit())?;
    let end = from + digits;
    // A number that ends a name counts operators, not layers: `/MatMul_1`.
    (from > 0 && matches!(&name[end..end + 1], "/" | ".")).then(|| &name[..end])
}

/// Consecutive kernels of one layer, or one kernel that belongs to none.
fn sections<'a>(kernels: &[&'a KernelReport]) -> Vec<(Option<&'a str>, Range<usize>)> {
    let mut sections: Vec<(Option<&str>, Range<usize>)> = Vec::new();
    for (i, k) in kernels.iter().enumerate() {
        let scope = scope(k);
        match sections.last_mut() {
            Some((last, range)) if scope.is_some() && *last == scope => range.end = i + 1,
            _ => sections.push((scope, i..i + 1)),
        }
    }
    // A lone kernel between two parts of a layer (a mask, say) goes with them.
    let mut merged: Vec<(Option<&str>, Range<usize>)> = Vec::new();
    for (scope, range) in sections {
        if let [.., (before, whole), (None, lone)] = &mut merged[..]
            && scope.is_some()
            && *before == scope
            && lone.len() == 1
        {
            whole.end = range.end;
            merged.pop();
        } else {
            merged.push((scope, range));
        }
    }
    merged
}

fn flow(e: &Report<'_>) -> Markup {
    let fold = e.kernels.len() > UNFOLDED_MAX;
    let most = e.kernels.iter().map(|k| k.share).fold(1e-9, f64::max);
    let sections = if fold { sections(&e.kernels) } else { vec![(None, 0..e.kernels.len())] };
    html! {
        h2 { "Kernels in order" }
        p { "Each box is a kernel with the operators that were fused into it; lines lead from a kernel to those that read its results. Open a box for its operators, operands and costs." }
        @if fold {
            div.tools { button type="button" data-open="yes" { "Unfold all layers" } button type="button" data-open="no" { "Fold" } }
        }
        div.flow {
            svg aria-hidden="true" {
                defs { marker #arrow viewBox="0 0 8 8" refX="6" refY="4" markerWidth="6" markerHeight="6" orient="auto-start-reverse" { path d="M0 0 L8 4 L0 8 z" style="fill: var(--soft); stroke: none" {} } }
            }
            @for (name, range) in &sections {
                @match name {
                    Some(name) if range.len() > 1 => (section(name, e, range.clone(), most)),
                    _ => @for at in range.clone() { (kernel(e, at, most)) },
                }
            }
        }
    }
}

fn section(name: &str, e: &Report<'_>, range: Range<usize>, most: f64) -> Markup {
    let kernels = &e.kernels[range.clone()];
    let share: f64 = kernels.iter().map(|k| k.share).sum();
    let seconds: f64 = kernels.iter().map(|k| k.seconds).sum();
    html! {
        details.scope {
            summary {
                span.mono { (name) }
                span.num { (kernels.len()) " kernels" }
                div.mix style="height: 10px" {
                    @for k in kernels { i class=(class(&k.anchor)) style=(format!("flex: {:.6} 1 0; min-width: 0", k.share)) {} }
                }
                span.num { (time_text(seconds)) }
                span.num { (percent(share)) }
            }
            @for at in range { (kernel(e, at, most)) }
        }
    }
}

fn kernel(e: &Report<'_>, at: usize, most: f64) -> Markup {
    let k = e.kernels[at];
    let after: Vec<String> = k.after.iter().map(usize::to_string).collect();
    let names = |list: &[String]| html! { @for name in list { code { (name) } } };
    html! {
        details.kernel.(class(&k.anchor)) id=(format!("k{}", k.step)) data-after=(after.join(" ")) {
            summary {
                span.no { (k.step) }
                span.label title=(k.nodes.join(", ")) { (k.label) }
                div.bar { i style=(format!("width: {:.1}%", k.share / most * 100.0)) {} }
                span.num { (time_text(k.seconds)) }
                span.num { (percent(k.share)) }
            }
            dl {
                dt { (k.nodes.len()) @if k.nodes.len() == 1 { " operator" } @else { " operators fused" } }
                dd { (names(&k.nodes)) }
                dt { "kernel" } dd { code { (k.kernel) } }
                dt { "reads" } dd { (names(&k.reads)) }
                dt { "writes" } dd { (names(&k.writes)) }
                dt { "work" } dd { (flops_text(k.flops)) ", " (bytes_text(k.bytes)) " moved, " (bytes_text(k.bytes_saved)) " saved by fusion" }
                dt { "limit" } dd { (k.roof.name()) ": " (format!("{:.0}%", k.fraction * 100.0)) " of what the ceiling allows" }
                @for (term, text) in e.details.get(at).into_iter().flatten() { dt { (term) } dd { (text) } }
                @if k.estimate_seconds > 0.0 { dt { "estimated" } dd { (time_text(k.estimate_seconds)) } }
            }
        }
    }
}

fn table(e: &Report<'_>) -> Markup {
    html! {
        h2 { "All kernels" }
        p { "Click a heading to sort." }
        div.card.scroll {
            table {
                thead { tr {
                    th.r data-sort="number" aria-sort="ascending" { "step" }
                    th data-sort="text" { "kernel" }
                    th data-sort="text" { "kind" }
                    th.r data-sort="number" { "fused" }
                    th.r data-sort="number" { "MFLOP" }
                    th.r data-sort="number" { "bytes" }
                    th.r data-sort="number" { "time" }
                    th.r data-sort="number" { "share" }
                    th.r data-sort="number" { "GFLOP/s" }
                    th data-sort="text" { "limit" }
                    th.r data-sort="number" { "reached" }
                } }
                tbody {
                    @for k in &e.kernels {
                        @let rate = k.flops * 1e-9 / k.seconds.max(1e-12);
                        tr data-k=(format!("k{}", k.step)) {
                            td.r data-v=(k.step) { (k.step) }
                            td.wide { (k.label) }
                            td { i.dot.(class(&k.anchor)) {} (k.anchor) }
                            td.r data-v=(k.nodes.len()) { (k.nodes.len()) }
                            td.r data-v=(k.flops) { (format!("{:.2}", k.flops * 1e-6)) }
                            td.r data-v=(k.bytes) { (bytes_text(k.bytes)) }
                            td.r data-v=(k.seconds) { (time_text(k.seconds)) }
                            td.r data-v=(k.share) { (percent(k.share)) }
                            td.r data-v=(rate) { (format!("{rate:.1}")) }
                            td { (k.roof.name()) }
                            td.r data-v=(k.fraction) { (format!("{:.0}%", k.fraction * 100.0)) }
                        }
                    }
                }
            }
        }
    }
}

fn bars(rows: &[(String, f64, String, bool)]) -> Markup {
    let most = rows.iter().map(|r| r.1).fold(1e-12, f64::max);
    html! {
        div.card { div.bars {
            @for (name, value, text, sum) in rows {
                span.sum[*sum] { (name) }
                div.bar { i style=(format!("width: {:.2}%", value / most * 100.0)) {} }
                span.num.sum[*sum] { (text) }
            }
        } }
    }
}

fn memory(e: &Report<'_>) -> Markup {
    let rows: Vec<_> = e
        .memory
        .iter()
        .map(|(name, bytes)| (name.to_string(), *bytes as f64, bytes_text(*bytes as f64), false))
        .collect();
    html! {
        h2 { "Memory" }
        p { "All intermediates share one arena, planned by how long each lives; \"naive\" is one allocation for each." }
        (bars(&rows))
    }
}

fn stages(e: &Report<'_>) -> Markup {
    // Stages named `... (all)` are sums over others.
    let is_sum = |name: &str| name.ends_with("(all)");
    let total: f64 = e.stages.iter().filter(|(n, _)| !is_sum(n)).map(|s| s.1).sum();
    let rows: Vec<_> = e
        .stages
        .iter()
        .filter(|(name, _)| !is_sum(name))
        .map(|(name, s)| (name.clone(), *s, time_text(*s), false))
        .collect();
    html! {
        h2 { "Compilation" }
        p { "What each stage took; " (time_text(total)) " in all." }
        (bars(&rows))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::explain::{MemoryReport, Roof};

    fn report(label: &str, kernels: usize) -> Explanation {
        let kernel = |step: usize| KernelReport {
            step,
            label: label.to_string(),
            kernel: "k<b>".into(),
            anchor: ["contract", "rows", "host", "new kind"][step % 4].into(),
            products: vec!["f32 x f32 -> f32 (fma)".into()],
            nodes: vec![format!("/layer.{}/Mul", step / 5), "\"quoted\" & <i>".into()],
            reads: vec!["a".into()],
            writes: vec!["b".into()],
            after: (step > 0).then(|| step - 1).into_iter().collect(),
            flops: if step % 7 == 3 { 0.0 } else { 1e6 * (step + 1) as f64 },
            bytes: 4096.0,
            bytes_saved: 0.0,
            seconds: 1e-5,
            share: 1.0 / kernels as f64,
            roof: Roof::Memory,
            fraction: 0.5,
            estimate_seconds: 0.0,
        };
        Explanation {
            model: label.to_string(),
            cpu: tilewright_target::Cpu::detect(2).unwrap(),
            sizes: vec![("batch".into(), 4)],
            kernels: (0..kernels).map(kernel).collect(),
            seconds: 1e-5 * kernels as f64,
            operators_before: 100,
            operators_after: 80,
            distinct_kernels: 3,
            memory: MemoryReport::default(),
            stages: vec![("simplify".into(), 0.001), ("passes (all)".into(), 0.001)],
        }
    }

    /// Every tag is closed in order, attributes are quoted, and no raw `<` or `&` stands in text.
    fn check(page: &str) {
        const VOID: [&str; 1] = ["meta"];
        let mut open: Vec<&str> = Vec::new();
        let mut rest = page.strip_prefix("<!DOCTYPE html>").unwrap();
        while let Some(at) = rest.find('<') {
            let text = &rest[..at];
            let raw = matches!(open.last(), Some(&"style" | &"script"));
            assert!(raw || !text.contains('>'), "{text}");
            for (i, _) in text.match_indices('&').filter(|_| !raw) {
                let entity = text[i..].split(';').next().unwrap();
                assert!(["&amp", "&lt", "&gt", "&quot"].contains(&entity), "{text}");
            }
            rest = &rest[at + 1..];
            if raw && !rest.starts_with("/style>") && !rest.starts_with("/script>") {
                continue;
            }
            let end = rest.find('>').unwrap();
            let tag = &rest[..end];
            rest = &rest[end + 1..];
            assert!(tag.matches('"').count().is_multiple_of(2) && !tag.contains('<'), "{tag}");
            assert!(tag.matches(" class=").count() <= 1, "{tag}");
            match tag.strip_prefix('/') {
                Some(name) => assert_eq!(open.pop(), Some(name)),
                None => {
                    let name = tag.split(' ').next().unwrap();
                    if !VOID.contains(&name) {
                        open.push(name);
                    }
                }
            }
        }
        assert!(open.is_empty(), "{open:?}");
    }

    #[test]
    fn pages_are_well_formed_whatever_the_names() {
        for (label, kernels) in [
            ("plain", 3),
            ("<script>alert(1)</script> & \"x\" 'y'", 1),
            ("large", 100),
            ("empty", 0),
        ] {
            let page = page(&report(label, kernels));
            check(&page);
            assert!(!page.contains("<script>alert"), "{label}");
            assert!(!page.contains("NaN") && !page.contains("inf\""), "{label}");
            // Nothing from outside: the only address is the name of the SVG namespace.
            let addresses = page.replace("http://www.w3.org/2000/svg", "");
            assert!(
                !addresses.contains("http")
                    && !addresses.contains("src=")
                    && !addresses.contains("url(h")
            );
            assert_eq!(page.matches("<tr data-k=").count(), kernels);
            assert_eq!(page.matches("<details class=\"kernel").count(), kernels);
        }
    }

    #[test]
    fn pages_of_gpus_are_well_formed_and_say_what_a_library_would_call() {
        let kernels = report("<i>", 50).kernels;
        let steps = kernels.into_iter().map(|report| crate::gpu::GpuStep {
            report,
            schedules: vec!["conv: BM=128 & <BN>".into()],
            library: "cublasLtMatmul \"bf16\"".into(),
            host: None,
        });
        let page = gpu_page(&GpuExplanation {
            once: 0,
            model: "<i>".into(),
            gpu: "H200 & more".into(),
            precision: "bf16".into(),
            sizes: vec![("batch".into(), 4)],
            steps: steps.collect(),
            seconds: 1e-3,
            run_seconds: 1e-3,
            launches: 50,
            graphs: 1,
            memory_bytes: [1 << 20, 1 << 10, 0, 1 << 11, 1 << 10],
            framework_bytes: 1 << 21,
            flops_per_s: [1e15, 6e13],
            bytes_per_s: 4e12,
            stages: vec![("lower".into(), 0.1)],
            warnings: vec![],
        });
        check(&page);
        assert_eq!(page.matches("<dt>instead of</dt>").count(), 50);
    }

    #[test]
    fn layers_of_a_large_model_fold() {
        let report = report("large", 100);
        let kernels: Vec<&KernelReport> = report.kernels.iter().collect();
        assert_eq!(sections(&kernels).len(), 20);
        let page = page(&report);
        assert_eq!(page.matches("<details class=\"scope").count(), 20);
    }
}
