//! Cooperative matrices in plain WGSL: kernels that use them run, slowly, on an adapter that has none, so that tests see their index
//! arithmetic anywhere.
//!
//! In: the text of a kernel whose matrices are all 16x16, whose lanes are numbered by `lane` in the function that uses them, and whose 32
//! lanes of a subgroup follow each other. Out: the same without `wgpu_cooperative_matrix`. Of a product's result a lane has eight
//! columns of row `lane % 32 / 2`, of the left operand it has that row, of the right one those columns. Each sum runs over ascending
//! terms in f32, so results are those of hardware up to its order within 16 terms.

use std::collections::BTreeSet;
use std::fmt::Write;

const ENABLE: &str = "enable wgpu_cooperative_matrix;";

/// `source` uses cooperative matrices.
pub(super) fn is_needed(source: &str) -> bool {
    source.contains(ENABLE)
}

/// Of a load or store: which matrix, how it lies, and in which variable.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Access {
    function: &'static str,
    variable: String,
}

/// `source` with its matrices replaced.
pub(super) fn emulate(source: &str) -> String {
    let mut text = source.replace(ENABLE, "");
    for (matrix, name) in [("f16, A", "MatrixA"), ("f16, B", "MatrixB"), ("f32, C", "MatrixC")] {
        text = text.replace(&format!("coop_mat16x16<{matrix}>"), name);
    }
    let mut accesses = BTreeSet::new();
    for (call, function) in [
        ("coopLoadT<MatrixA>(", "load_a"),
        ("coopLoadT<MatrixB>(", "load_b_rows"),
        ("coopLoad<MatrixB>(", "load_b"),
        ("coopLoadT<MatrixC>(", "load_c"),
        ("coopStoreT(", "store_c"),
    ] {
        text = replace_calls(&text, call, function, &mut accesses);
    }
    text = text.replace("coopMultiplyAdd(", "multiply_add(lane, ");
    let left = ["coop_mat", "coopLoad", "coopStore", "coopMultiplyAdd"].into_iter().find(|word| text.contains(word));
    assert_eq!(left, None, "a use of cooperative matrices is not known:\n{text}");
    text.push_str(TYPES);
    let variables: BTreeSet<_> = accesses.iter().map(|access| access.variable.clone()).collect();
    for variable in variables {
        text.push_str(&elements(&text, &variable));
    }
    for Access { function, variable } in accesses {
        text.push_str(&definition(function, &variable));
    }
    text
}

/// `call` with `&variable[index]` among its arguments becomes `function_variable(lane, …, index, …)`.
fn replace_calls(text: &str, call: &str, function: &'static str, accesses: &mut BTreeSet<Access>) -> String {
    let mut out = String::new();
    let mut rest = text;
    while let Some(at) = rest.find(call) {
        out.push_str(&rest[..at]);
        rest = &rest[at + call.len()..];
        let (before, place) = rest.split_once('&').expect("memory is named by a reference");
        let (variable, index) = place.split_once('[').expect("of an element");
        let mut depth = 1;
        let end = index.find(|c| {
            depth += (c == '[') as i32 - (c == ']') as i32;
            depth == 0
        });
        let end = end.expect("the index ends");
        write!(out, "{function}_{variable}(lane, {before}{}", &index[..end]).expect("writes to a string");
        accesses.insert(Access { function, variable: variable.to_owned() });
        rest = &index[end + 1..];
    }
    out + rest
}

const TYPES: &str = "
struct MatrixA { row: array<f32, 16> }
struct MatrixB { columns: array<array<vec4<f32>, 2>, 16> }
struct MatrixC { columns: array<vec4<f32>, 2> }
// 16, which no compiler sees: Mesa's would unroll every loop of every product.
fn terms_of_product(lane: u32) -> u32 { return 16u + lane / 65536u; }
fn multiply_add(lane: u32, a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC {
    var left = a;
    var right = b;
    var sums = c;
    for (var k = 0u; k < terms_of_product(lane); k++) {
        sums.columns[0] = fma(vec4(left.row[k]), right.columns[k][0], sums.columns[0]);
        sums.columns[1] = fma(vec4(left.row[k]), right.columns[k][1], sums.columns[1]);
    }
    return sums;
}
";

/// What `text` declares the elements of a variable to be.
fn kind<'a>(text: &'a str, variable: &str) -> &'a str {
    let declaration = text.find(&format!(" {variable}: array<")).expect("the variable is an array");
    let kind = text[declaration..].split_once("array<").expect("an array").1;
    // Up to the count, or to the bracket that closes an array without one.
    let mut depth = 0;
    let end = kind.find(|c| {
        depth += (c == '<') as i32 - (c == '>') as i32;
        depth < 0 || depth == 0 && c == ','
    });
    &kind[..end.expect("the array ends")]
}

/// `half_<variable>(i)` reads number `i` of the f16 that lie in a variable, `float_<variable>(i)` of its f32, `put_<variable>` writes those.
/// `halves_` and `floats_<variable>` are how many lie in one of its elements.
fn elements(text: &str, variable: &str) -> String {
    let half = |word: &str| format!("unpack2x16float({word})[i % 2u]");
    let (halves, read_half, floats, float) = match kind(text, variable) {
        "vec4<f16>" => (4, format!("f32({variable}[i / 4u][i % 4u])"), 0, None),
        "vec4<u32>" => (8, half(&format!("{variable}[i / 8u][i / 2u % 4u]")), 0, None),
        "vec4<f32>" => (
            8,
            half(&format!("bitcast<u32>({variable}[i / 8u][i / 2u % 4u])")),
            4,
            Some(format!("{variable}[i / 4u][i % 4u]")),
        ),
        "f32" => (2, half(&format!("bitcast<u32>({variable}[i / 2u])")), 1, Some(format!("{variable}[i]"))),
        other => panic!("{variable} is of {other}"),
    };
    let mut out = format!(
        "const halves_{variable}: u32 = {halves}u;\nfn half_{variable}(i: u32) -> f32 {{ return {read_half}; }}\n"
    );
    if let Some(float) = float {
        write!(
            out,
            "const floats_{variable}: u32 = {floats}u;\nfn float_{variable}(i: u32) -> f32 {{ return {float}; }}\n\
             fn put_{variable}(i: u32, x: f32) {{ {float} = x; }}\n"
        )
        .expect("writes to a string");
    }
    out
}

fn definition(function: &str, variable: &str) -> String {
    let of_floats = matches!(function, "load_c" | "store_c");
    let (units, element) = if of_floats { ("floats", "float") } else { ("halves", "half") };
    let start = format!(
        "let origin = at * {units}_{variable};\nlet stride = pitch * {units}_{variable};\nlet row = lane % 32u / 2u;\nlet \
         column = lane % 2u * 8u;\n"
    );
    let read = |index: &str| format!("{element}_{variable}({index})");
    let (signature, body) = match function {
        "load_a" => (
            "(lane: u32, at: u32, pitch: u32) -> MatrixA",
            format!(
                "var m: MatrixA;\nfor (var k = 0u; k < terms_of_product(lane); k++) {{ m.row[k] = {}; }}\nreturn m;",
                read("origin + row * stride + k")
            ),
        ),
        "load_b" | "load_b_rows" => {
            let index = |i: u32| match function {
                "load_b" => format!("origin + (column + {i}u) * stride + k"),
                _ => format!("origin + k * stride + column + {i}u"),
            };
            let quad = |first: u32| (first..first + 4).map(|i| read(&index(i))).collect::<Vec<_>>().join(", ");
            (
                "(lane: u32, at: u32, pitch: u32) -> MatrixB",
                format!(
                    "var m: MatrixB;\nfor (var k = 0u; k < terms_of_product(lane); k++) {{\nm.columns[k][0] = vec4({});\nm.columns[k][1] = \
                     vec4({});\n}}\nreturn m;",
                    quad(0),
                    quad(4)
                ),
            )
        }
        "load_c" => (
            "(lane: u32, at: u32, pitch: u32) -> MatrixC",
            format!(
                "var m: MatrixC;\nfor (var i = 0u; i < 8u; i++) {{ m.columns[i / 4u][i % 4u] = {}; }}\nreturn m;",
                read("origin + row * stride + column + i")
            ),
        ),
        _ => (
            "(lane: u32, matrix: MatrixC, at: u32, pitch: u32)",
            format!(
                "var m = matrix;\nfor (var i = 0u; i < 8u; i++) {{ put_{variable}(origin + row * stride + column + i, \
                 m.columns[i / 4u][i % 4u]); }}"
            ),
        ),
    };
    format!("fn {function}_{variable}{signature} {{\n{start}{body}\n}}\n")
}
