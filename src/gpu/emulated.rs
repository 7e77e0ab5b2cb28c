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
    text = text.replace("coopMultiplyAdd(", "multiply_add(");
    let left = ["coop_mat", "coopLoad", "coopStore", "coopMultiplyAdd"].into_iter().find(|word| text.contains(word));
    assert_eq!(left, None, "a use of cooperative matrices is not known:\n{text}");
    text.push_str(TYPES);
    let variables: BTreeSet<_> = accesses.iter().map(|access| access.variable.clone()).collect();
    for variable in variables {
        text.push_str(&element(&text, &variable));
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
fn multiply_add(a: MatrixA, b: MatrixB, c: MatrixC) -> MatrixC {
    var left = a;
    var right = b;
    var sums = c;
    for (var k = 0u; k < 16u; k++) {
        sums.columns[0] = fma(vec4(left.row[k]), right.columns[k][0], sums.columns[0]);
        sums.columns[1] = fma(vec4(left.row[k]), right.columns[k][1], sums.columns[1]);
    }
    return sums;
}
";

/// `element_<variable>(i)` reads number `i` of what lies in a variable, f16 or f32; `units_<variable>` is how many lie in one of its elements.
fn element(text: &str, variable: &str) -> String {
    let declaration = text.find(&format!("> {variable}: array<")).expect("the variable is an array");
    let kind = text[declaration..].split_once("array<").expect("an array").1;
    let kind = kind.split_once(|c| c == ',' || c == '>').expect("of elements").0;
    let (units, read, write) = match kind {
        "vec4<f16" => (4, format!("f32({variable}[i / 4u][i % 4u])"), None),
        "vec4<u32" => (8, format!("unpack2x16float({variable}[i / 8u][i / 2u % 4u])[i % 2u]"), None),
        "vec4<f32" => (4, format!("{variable}[i / 4u][i % 4u]"), Some(format!("{variable}[i / 4u][i % 4u] = x;"))),
        "f32" => (1, format!("{variable}[i]"), Some(format!("{variable}[i] = x;"))),
        _ => panic!("{variable} is of {kind}"),
    };
    let mut out = format!("const units_{variable}: u32 = {units}u;\nfn element_{variable}(i: u32) -> f32 {{ return {read}; }}\n");
    if let Some(write) = write {
        writeln!(out, "fn put_{variable}(i: u32, x: f32) {{ {write} }}").expect("writes to a string");
    }
    out
}

fn definition(function: &str, variable: &str) -> String {
    let start = format!(
        "let from = at * units_{variable};\nlet stride = pitch * units_{variable};\nlet row = lane % 32u / 2u;\nlet column = lane % \
         2u * 8u;\n"
    );
    let read = |index: &str| format!("element_{variable}({index})");
    let (signature, body) = match function {
        "load_a" => (
            "(lane: u32, at: u32, pitch: u32) -> MatrixA",
            format!(
                "var m: MatrixA;\nfor (var k = 0u; k < 16u; k++) {{ m.row[k] = {}; }}\nreturn m;",
                read("from + row * stride + k")
            ),
        ),
        "load_b" | "load_b_rows" => {
            let index = if function == "load_b" { "from + (column + i) * stride + k" } else { "from + k * stride + column + i" };
            let quad = |first: u32| {
                let one = |i: u32| read(&index.replace(" i", &format!(" {i}u")).replace("+ i", &format!("+ {i}u")));
                (first..first + 4).map(one).collect::<Vec<_>>().join(", ")
            };
            (
                "(lane: u32, at: u32, pitch: u32) -> MatrixB",
                format!(
                    "var m: MatrixB;\nfor (var k = 0u; k < 16u; k++) {{\nm.columns[k][0] = vec4({});\nm.columns[k][1] = \
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
                read("from + row * stride + column + i")
            ),
        ),
        _ => (
            "(lane: u32, matrix: MatrixC, at: u32, pitch: u32)",
            format!(
                "var m = matrix;\nfor (var i = 0u; i < 8u; i++) {{ put_{variable}(from + row * stride + column + i, \
                 m.columns[i / 4u][i % 4u]); }}"
            ),
        ),
    };
    format!("fn {function}_{variable}{signature} {{\n{start}{body}\n}}\n")
}
