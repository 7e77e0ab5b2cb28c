//! Loops written out: matrices and staged values have to be named by constants to stay in registers, and WGSL has no way to ask for it.

/// Writes out the loops of `text` that are marked so, `for (var i = 0u; i < COUNT; i++) { // unrolled` to `} // i`, one block per
/// value of `i`. `counts` has the values of the counts, spelled as the loops have them.
pub(super) fn unroll(text: &str, counts: &[(&str, u32)]) -> String {
    let mut out = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let Some((variable, count)) = header(line) else {
            out.push_str(line);
            out.push('\n');
            continue;
        };
        let (_, count) = counts.iter().find(|(name, _)| *name == count).unwrap_or_else(|| panic!("no count {count}"));
        // Loops inside it may have the same variable.
        let mut depth = 1;
        let mut body = String::new();
        for line in lines.by_ref() {
            if header(line).is_some_and(|(inner, _)| inner == variable) {
                depth += 1;
            } else if line.trim() == format!("}} // {variable}") {
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            body.push_str(line);
            body.push('\n');
        }
        assert_eq!(depth, 0, "the loop over {variable} has no end");
        for i in 0..*count {
            let body = replace_word(&body, variable, &format!("{i}u"));
            out.push_str(&format!("{{\n{}}}\n", unroll(&body, counts)));
        }
    }
    out
}

/// Variable and count of a loop that is marked.
fn header(line: &str) -> Option<(&str, &str)> {
    let header = line.trim().strip_suffix("// unrolled")?.strip_prefix("for (var ")?;
    let (variable, rest) = header.split_once(" = 0u; ")?;
    let count = rest.strip_prefix(variable)?.strip_prefix(" < ")?.split_once(';')?.0;
    Some((variable, count))
}

fn replace_word(text: &str, word: &str, with: &str) -> String {
    let of_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(word) {
        let before = rest[..at].chars().next_back().or(out.chars().next_back());
        let after = rest[at + word.len()..].chars().next();
        out.push_str(&rest[..at]);
        out.push_str(if before.is_some_and(of_word) || after.is_some_and(of_word) { word } else { with });
        rest = &rest[at + word.len()..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marked_loops_become_a_block_for_each_value() {
        let text = "for (var i = 0u; i < N; i++) { // unrolled\nfi[i] = i * 4u;\nfor (var j = 0u; j < M / 2u; j++) { // unrolled\nb(i, j);\n} // j\n} // i\nfor (var i = 0u; i < N; i++) {}";
        let want = "{\nfi[0u] = 0u * 4u;\n{\nb(0u, 0u);\n}\n}\n{\nfi[1u] = 1u * 4u;\n{\nb(1u, 0u);\n}\n}\nfor (var i = 0u; i < N; i++) {}\n";
        assert_eq!(unroll(text, &[("N", 2), ("M / 2u", 1)]), want);
    }
}
