//! [`Prototype`]: what a function is called and which values it takes, read from LLVM IR text.
//!
//! A caller turns an address into a function pointer; this is how it knows that the types fit.

/// Name and type of a function, in LLVM's words: `sum`, `void (ptr, i64)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prototype {
    /// The name in its source, without `@`.
    pub name: String,
    /// Return type and parameter types, without attributes and names.
    pub signature: String,
}

impl Prototype {
    /// The definition of `@name` in a module's text. A definition's head stands on one line.
    pub fn find(text: &str, name: &str) -> Option<Prototype> {
        let opening = format!(" @{name}(");
        text.lines().filter(|line| line.starts_with("define ")).find_map(|line| {
            let (before, after) = line.split_once(&opening)?;
            let result = before.split_whitespace().last()?;
            let types: Vec<&str> = parameters(after)?
                .into_iter()
                .map(|p| p.split_whitespace().next().unwrap_or(""))
                .collect();
            let signature = format!("{result} ({})", types.join(", "));
            Some(Prototype { name: name.to_string(), signature })
        })
    }
}

/// The parameters in `text`, which begins behind the opening parenthesis; attributes such as
/// `dereferenceable(8)` and types such as `[2 x i8]` may hold brackets.
fn parameters(text: &str) -> Option<Vec<&str>> {
    let mut all = Vec::new();
    let (mut depth, mut start) = (0, 0);
    for (at, c) in text.char_indices() {
        match c {
            ')' if depth == 0 => {
                let last = text[start..at].trim();
                if !(all.is_empty() && last.is_empty()) {
                    all.push(last);
                }
                return Some(all);
            }
            ',' if depth == 0 => {
                all.push(text[start..at].trim());
                start = at + 1;
            }
            '(' | '[' | '{' | '<' => depth += 1,
            ')' | ']' | '}' | '>' => depth -= 1,
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_found_among_others() {
        let text = "; @f(\ndefine internal float @g(float %x) #1 {\n}\n\
                    define void @f(ptr noalias dereferenceable(8) %p, i64 %n,ptr align 64 %q) #0 {\n}\n\
                    define internal i64 @h() {\n}\n";
        let signature = |name: &str| Prototype::find(text, name).map(|p| p.signature);
        assert_eq!(signature("f").as_deref(), Some("void (ptr, i64, ptr)"));
        assert_eq!(signature("g").as_deref(), Some("float (float)"));
        assert_eq!(signature("h").as_deref(), Some("i64 ()"));
        assert_eq!(signature("i"), None);
        assert_eq!(Prototype::find("define void @f(ptr %p", "f"), None);
    }
}
