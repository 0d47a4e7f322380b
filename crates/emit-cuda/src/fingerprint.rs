//! [`fingerprint`]: which code a kernel is, apart from how it is written down.
//!
//! A measurement of a kernel is worth something as long as the kernel is the same. Its text is not enough, since it
//! calls the device library; the whole library is too much, since most changes there do not concern it. So the
//! fingerprint is of the kernel's text and of those items of the library (functions, types, macros) that it reaches by
//! name, without comments and spacing.
//!
//! An item is found by a name that it declares; one whose name is not understood always counts. Macros that paste
//! names (`TW_OUT_##R`) reach every item whose name begins so. Too many items make a fingerprint that changes
//! without need, never one that stays without reason.

use crate::{Source, headers};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::sync::OnceLock;

/// One item of the library.
#[derive(Debug)]
struct Item {
    /// Without comments, words apart by single blanks, the conditions around it in front.
    text: String,
    /// What it declares; none when that was not understood.
    name: Option<String>,
}

/// 32 hexadecimal digits that change when the code of the kernel does, or the library's code that it uses.
pub fn fingerprint(source: &Source) -> String {
    static ITEMS: OnceLock<Vec<Item>> = OnceLock::new();
    let items = ITEMS.get_or_init(|| headers().iter().flat_map(|(_, text)| items(text)).collect());
    digest(&source.text, items)
}

fn digest(kernel: &str, items: &[Item]) -> String {
    let kernel: Vec<String> =
        plain(kernel).lines().filter(|l| !l.starts_with("#include")).map(words).collect();
    let kernel = kernel.join("\n");
    let mut reached = vec![false; items.len()];
    let mut open = vec![kernel.as_str()];
    for (item, reached) in items.iter().zip(&mut reached) {
        if item.name.is_none() {
            *reached = true;
            open.push(&item.text);
        }
    }
    while let Some(text) = open.pop() {
        let (names, starts) = mentioned(text);
        for (item, reached) in items.iter().zip(&mut reached) {
            let Some(name) = item.name.as_deref().filter(|_| !*reached) else { continue };
            if names.contains(name) || starts.iter().any(|s| name.starts_with(s)) {
                *reached = true;
                open.push(&item.text);
            }
        }
    }
    let mut hash = Sha256::new();
    hash.update(kernel);
    for (item, _) in items.iter().zip(reached).filter(|(_, reached)| *reached) {
        hash.update("\n");
        hash.update(&item.text);
    }
    hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

/// Names in a text, and beginnings of names that are pasted together.
fn mentioned(text: &str) -> (BTreeSet<&str>, Vec<&str>) {
    let mut starts = Vec::new();
    for (at, _) in text.match_indices("##") {
        let before = text[..at].trim_end();
        let begin = before.rfind(|c: char| !is_word(c)).map_or(0, |i| i + 1);
        if begin < before.len() {
            starts.push(&before[begin..]);
        }
    }
    (text.split(|c: char| !is_word(c)).filter(|w| !w.is_empty()).collect(), starts)
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// Single blanks only.
fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Without comments, continued lines joined.
fn plain(text: &str) -> String {
    let text = text.replace("\\\n", " ");
    let mut out = String::new();
    let mut rest = text.as_str();
    while let Some(c) = rest.chars().next() {
        if rest.starts_with("//") {
            rest = rest.find('\n').map_or("", |at| &rest[at..]);
        } else if rest.starts_with("/*") {
            rest = rest.find("*/").map_or("", |at| &rest[at + 2..]);
            out.push(' ');
        } else if c == '"' || c == '\'' {
            let end = quoted(rest, c);
            out.push_str(&rest[..end]);
            rest = &rest[end..];
        } else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
        }
    }
    out
}

/// Where a string or a character ends.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            _ if c == quote => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// The items of a header.
fn items(text: &str) -> Vec<Item> {
    let text = plain(text);
    let mut out = Vec::new();
    let mut conditions: Vec<String> = Vec::new();
    let mut open = String::new();
    let mut depth = 0usize;
    for line in text.lines() {
        let line = line.trim();
        let directive = line.strip_prefix('#').map(str::trim_start);
        match directive {
            // Inside an item, lines for the preprocessor are part of it.
            Some(directive) if depth == 0 => {
                let word = directive.split_whitespace().next().unwrap_or_default();
                let item = |name| Item { text: with(&conditions, line), name };
                match word {
                    "if" | "ifdef" | "ifndef" => conditions.push(words(directive)),
                    "else" | "elif" => {
                        let before = conditions.pop().unwrap_or_default();
                        conditions.push(format!("not {before} {}", words(directive)));
                    }
                    "endif" => drop(conditions.pop()),
                    "include" | "pragma" | "undef" => {}
                    "define" => {
                        let rest = directive["define".len()..].trim_start();
                        let end = rest.find(|c| !is_word(c)).unwrap_or(rest.len());
                        out.push(item(Some(rest[..end].to_owned())));
                    }
                    _ => out.push(item(None)),
                }
            }
            _ => {
                for piece in pieces(line) {
                    open.push_str(piece);
                    match piece {
                        "{" if words(&open).starts_with("namespace") => open.clear(),
                        "{" => depth += 1,
                        // The end of a namespace.
                        "}" if depth == 0 => open.clear(),
                        "}" => {
                            depth -= 1;
                            if depth == 0 && ends_with_its_body(&open) {
                                finish(&mut open, &conditions, &mut out);
                            }
                        }
                        ";" if depth == 0 => finish(&mut open, &conditions, &mut out),
                        _ => {}
                    }
                }
                open.push('\n');
            }
        }
    }
    finish(&mut open, &conditions, &mut out);
    out
}

/// A line cut at braces and semicolons outside strings.
fn pieces(line: &str) -> Vec<&str> {
    let mut out = Vec::new();
    let (mut begin, mut at) = (0, 0);
    while let Some(c) = line[at..].chars().next() {
        if c == '"' || c == '\'' {
            at += quoted(&line[at..], c);
            continue;
        }
        if matches!(c, '{' | '}' | ';') {
            out.push(&line[begin..at]);
            out.push(&line[at..at + 1]);
            begin = at + 1;
        }
        at += c.len_utf8();
    }
    out.push(&line[begin..]);
    out.retain(|piece| !piece.is_empty());
    out
}

fn with(conditions: &[String], text: &str) -> String {
    conditions.iter().map(|c| format!("[{c}] ")).collect::<String>() + &words(text)
}

fn finish(open: &mut String, conditions: &[String], out: &mut Vec<Item>) {
    let text = std::mem::take(open);
    if !text.trim().is_empty() && text.trim() != ";" {
        out.push(Item { name: declared(&text), text: with(conditions, &text) });
    }
}

/// What stands before the body, without what a template is of: that may contain anything.
fn head(text: &str) -> Option<&str> {
    let head = text.split(['{', ';']).next().unwrap_or_default().trim();
    let Some(rest) = head.strip_prefix("template") else { return Some(head) };
    let (mut angles, mut round) = (0i32, 0i32);
    let end = rest.char_indices().find(|(_, c)| {
        round += i32::from(*c == '(') - i32::from(*c == ')');
        if round == 0 {
            angles += i32::from(*c == '<') - i32::from(*c == '>');
        }
        angles == 0 && round == 0 && *c == '>'
    })?;
    Some(rest[end.0 + 1..].trim_start())
}

/// Whether the brace that closed is the end: of a function it is, types and variables go on to a semicolon.
fn ends_with_its_body(text: &str) -> bool {
    let Some(head) = head(text) else { return true };
    let is_type = ["struct", "enum", "union", "class"].iter().any(|word| head.starts_with(word));
    let round = head.find('(').unwrap_or(head.len());
    !is_type && round < head.len() && !head[..round].contains('=')
}

/// The name that an item declares.
fn declared(text: &str) -> Option<String> {
    let head = head(text)?;
    let first = head.split_whitespace().next()?;
    if matches!(first, "struct" | "enum" | "union" | "class" | "using") {
        let rest = head[first.len()..].trim_start();
        // The name follows the last closing parenthesis of an alignment.
        let rest = if rest.starts_with("alignas") { &rest[rest.rfind(')')? + 1..] } else { rest };
        let word = rest.split_whitespace().find(|w| !matches!(*w, "class" | "struct"))?;
        let end = word.find(|c| !is_word(c)).unwrap_or(word.len());
        return (end > 0).then(|| word[..end].to_owned());
    }
    let mut before = head.split(['(', '=', '[']).next()?.trim_end();
    // A specialisation has the name of what it specialises.
    if before.ends_with('>') {
        before = before[..before.find('<')?].trim_end();
    }
    let begin = before.rfind(|c| !is_word(c)).map_or(0, |i| i + 1);
    let name = &before[begin..];
    let odd = name.is_empty()
        || head.contains("operator")
        || matches!(name, "static_assert" | "__launch_bounds__" | "alignas" | "decltype");
    (!odd).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBRARY: &str = "#pragma once\n#include \"tw/base.cuh\"\nnamespace tw {\n// Adds.\n\
        TW_INLINE int add(int a, int b) { return a + b; }\n\
        template <typename T, int N = (3 > 2)>\nTW_INLINE T twice(T x) {\n#pragma unroll\n  return add(x, x);\n}\n\
        struct Pair {\n  int x[2];\n};\n#if __CUDA_ARCH__ >= 900\n#define ONE_4 4\n#define ONE(R) ONE_##R\n#endif\n\
        constexpr int table[2] = {1, 2};\nTW_INLINE void other() { asm(\"{ ; }\"); }\n}  // namespace tw\n";

    fn of(kernel: &str, library: &str) -> String {
        digest(kernel, &items(library))
    }

    #[test]
    fn items_have_names() {
        let names: Vec<_> = items(LIBRARY).into_iter().map(|i| i.name.unwrap()).collect();
        assert_eq!(names, ["add", "twice", "Pair", "ONE_4", "ONE", "table", "other"]);
    }

    #[test]
    fn only_what_a_kernel_reaches_counts() {
        let kernel = "// of today\n#include \"tw/x.cuh\"\nvoid k() { tw::twice(1); }\n";
        let before = of(kernel, LIBRARY);
        let same = |from: &str, to: &str| {
            assert!(LIBRARY.contains(from), "{from}");
            of(kernel, &LIBRARY.replace(from, to)) == before
        };
        assert!(same("// Adds.", "// Sums.") && same("a + b", "a  +\n b"));
        assert!(same("{ ; }", "{ nop; }") && same("{1, 2}", "{1, 3}") && same("int x[2]", "int y"));
        assert!(!same("a + b", "b + a") && !same("pragma unroll", "pragma unroll 2"));
        assert_eq!(of(&kernel.replace("today", "old").replace("x.cuh", "y.cuh"), LIBRARY), before);
        assert_ne!(of(&kernel.replace("twice", "add"), LIBRARY), before);
    }

    #[test]
    fn pasted_names_are_reached() {
        let kernel = "int x = ONE(4);";
        assert_ne!(of(kernel, LIBRARY), of(kernel, &LIBRARY.replace("ONE_4 4", "ONE_4 5")));
        assert_ne!(of(kernel, LIBRARY), of(kernel, &LIBRARY.replace(">= 900", ">= 890")));
    }

    #[test]
    fn the_library_is_understood() {
        let all: Vec<Item> = headers().iter().flat_map(|(_, text)| items(text)).collect();
        let unknown: Vec<&Item> = all.iter().filter(|i| i.name.is_none()).collect();
        assert!(all.len() > 150, "{}", all.len());
        assert!(unknown.len() < 8, "{unknown:#?}");
        for name in ["wgmma_fence", "TW_OUT_128"] {
            assert!(all.iter().any(|i| i.name.as_deref() == Some(name)), "{name}");
        }
    }
}
