//! Every kernel's source against naga, without a GPU: it validates for every dtype and every combination of tunables, and
//! its bindings, parameters and sizes are what the Rust side believes.

use std::collections::HashSet;
use std::path::Path;

use fulmen::checkpoint::Dtype;
use fulmen::gpu::{Access, Kernel, ParamField, Variant};
use fulmen::kernels::cooperative::{self, Tile};
use fulmen::kernels::decode_attention::SPLIT_TOKENS;
use fulmen::kernels::lm_head_sample::{LM_HEAD_SAMPLE, Sample};
use fulmen::kernels::paged_attention::{MAX_HEAD_WIDTH, Shape};
use fulmen::kernels::router_topk::MAX_CHOSEN;
use fulmen::kernels::slabs::ABSENT;
use fulmen::kernels::{ALL, BLOCK_TOKENS, MAX_EXPERTS};
use fulmen::tune::{Operation, Tiles, candidates};
use naga::valid::{Capabilities, ModuleInfo, ValidationFlags, Validator};
use naga::{AddressSpace, Handle, Module, StorageAccess, Type, TypeInner};

/// What the smallest adapters have: Vulkan promises 16 KiB of workgroup memory, WebGPU 256 invocations.
const MAX_WORKGROUP_BYTES: u32 = 16 << 10;
const MAX_INVOCATIONS: u32 = 256;

fn parse(kernel: &Kernel, variant: &Variant) -> (Module, ModuleInfo) {
    let source = kernel.source(variant);
    let module = naga::front::wgsl::parse_str(&source)
        .unwrap_or_else(|e| panic!("{} {variant:?}: {}", kernel.name, e.emit_to_string(&source)));
    let info = Validator::new(ValidationFlags::all(), Capabilities::all())
        .validate(&module)
        .unwrap_or_else(|e| panic!("{} {variant:?}: {}", kernel.name, e.emit_to_string(&source)));
    (module, info)
}

/// Parsed, validated, and with the tunables' values filled in: what the driver gets.
fn specialise(kernel: &Kernel, variant: &Variant) -> Module {
    let (module, info) = parse(kernel, variant);
    let constants = variant.tunables.iter().map(|(name, value)| (name.to_string(), *value as f64)).collect();
    let (module, _) = naga::back::pipeline_constants::process_overrides(&module, &info, None, &constants)
        .unwrap_or_else(|e| panic!("{} {variant:?}: {e}", kernel.name));
    module.into_owned()
}

fn each_variant(mut check: impl FnMut(&Kernel, &Variant, &Module)) {
    for kernel in ALL {
        for variant in kernel.variants() {
            check(kernel, &variant, &specialise(kernel, &variant));
        }
    }
}

fn wgsl_name(inner: &TypeInner) -> &'static str {
    match *inner {
        TypeInner::Scalar(naga::Scalar::U32) => "u32",
        TypeInner::Scalar(naga::Scalar::I32) => "i32",
        TypeInner::Scalar(naga::Scalar::F32) => "f32",
        _ => panic!("a field is no 32-bit scalar: {inner:?}"),
    }
}

fn assert_same_struct(what: &str, module: &Module, ty: Handle<Type>, declared: &[ParamField], bytes: usize) {
    let Type { name, inner: TypeInner::Struct { members, span } } = &module.types[ty] else {
        panic!("{what}: {:?} is no struct", module.types[ty]);
    };
    let fields: Vec<_> = members
        .iter()
        .map(|member| {
            let name = member.name.as_deref().expect("WGSL members have names");
            (name, member.offset as usize, wgsl_name(&module.types[member.ty].inner))
        })
        .collect();
    let declared: Vec<_> = declared.iter().map(|field| (field.name, field.offset, field.wgsl_type)).collect();
    assert_eq!(fields, declared, "{what}: fields of {name:?}");
    assert_eq!(*span as usize, bytes, "{what}: size of {name:?}");
}

fn workgroup_bytes(module: &Module) -> u32 {
    let variables = module.global_variables.iter().map(|(_, variable)| variable);
    let shared = variables.filter(|variable| variable.space == AddressSpace::WorkGroup);
    shared.map(|variable| module.types[variable.ty].inner.size(module.to_ctx())).sum()
}

#[test]
fn entry_point_is_main_and_sizes_fit_every_adapter() {
    each_variant(|kernel, variant, module| {
        let what = format!("{} {variant:?}", kernel.name);
        assert_eq!(module.entry_points.len(), 1, "{what}: entry points");
        let entry = &module.entry_points[0];
        assert_eq!((entry.name.as_str(), entry.stage), ("main", naga::ShaderStage::Compute), "{what}");
        let invocations: u32 = entry.workgroup_size.iter().product();
        assert!(invocations <= MAX_INVOCATIONS, "{what}: {:?} invocations", entry.workgroup_size);
        let workgroup_bytes = workgroup_bytes(module);
        assert!(workgroup_bytes <= MAX_WORKGROUP_BYTES, "{what}: {workgroup_bytes} bytes of workgroup memory");
    });
}

#[test]
fn bindings_are_dense_and_have_the_declared_access() {
    each_variant(|kernel, variant, module| check_bindings(kernel, &format!("{} {variant:?}", kernel.name), module));
}

fn check_bindings(kernel: &Kernel, what: &str, module: &Module) {
    let mut bindings: Vec<_> = module
        .global_variables
        .iter()
        .filter_map(|(_, variable)| {
            let binding = variable.binding.as_ref()?;
            let access = match variable.space {
                AddressSpace::Storage { access } if access == StorageAccess::LOAD => Access::Read,
                AddressSpace::Storage { .. } => Access::ReadWrite,
                space => panic!("{}: {:?} is bound in {space:?}", kernel.name, variable.name),
            };
            assert_eq!(binding.group, 0, "{}: group of {:?}", kernel.name, variable.name);
            Some((binding.binding, access))
        })
        .collect();
    bindings.sort_by_key(|(binding, _)| *binding);
    let declared: Vec<_> = (0..).zip(kernel.bindings.iter().copied()).collect();
    assert_eq!(bindings, declared, "{what}");
}

#[test]
fn params_have_the_layout_of_the_rust_struct() {
    each_variant(|kernel, variant, module| {
        let what = format!("{} {variant:?}", kernel.name);
        let mut immediates =
            module.global_variables.iter().filter(|(_, variable)| variable.space == AddressSpace::Immediate);
        let (_, params) = immediates.next().unwrap_or_else(|| panic!("{what}: has no immediates"));
        assert!(immediates.next().is_none(), "{what}: has two immediates");
        assert_same_struct(&what, module, params.ty, kernel.params, kernel.param_bytes);
        assert!(kernel.param_bytes <= 128, "{what}: Vulkan promises 128 bytes of push constants");
    });
}

#[test]
fn samples_have_the_layout_of_the_rust_struct() {
    let module = specialise(&LM_HEAD_SAMPLE, &LM_HEAD_SAMPLE.variants()[0]);
    let (sample, _) = module.types.iter().find(|(_, t)| t.name.as_deref() == Some("Sample")).expect("it has a Sample");
    assert_same_struct("lm_head_sample", &module, sample, Sample::FIELDS, size_of::<Sample>());
}

/// Constants that both sides spell out.
#[test]
fn shared_constants_are_the_same_in_every_shader() {
    let shared = [
        ("BLOCK_TOKENS", BLOCK_TOKENS as u32),
        ("MAX_EXPERTS", MAX_EXPERTS),
        ("MAX_CHOSEN", MAX_CHOSEN),
        ("MAX_HEAD_WIDTH", MAX_HEAD_WIDTH),
        ("SPLIT_TOKENS", SPLIT_TOKENS),
        ("ABSENT", ABSENT),
    ];
    let mut seen = HashSet::new();
    each_variant(|kernel, _, module| {
        for (_, constant) in module.constants.iter() {
            let Some((name, wanted)) = shared.iter().find(|(name, _)| constant.name.as_deref() == Some(*name)) else {
                continue;
            };
            let value = &module.global_expressions[constant.init];
            let wanted = naga::Expression::Literal(naga::Literal::U32(*wanted));
            assert_eq!(format!("{value:?}"), format!("{wanted:?}"), "{}: {name}", kernel.name);
            seen.insert(*name);
        }
    });
    shared.iter().for_each(|(name, _)| assert!(seen.contains(name), "no shader has {name}"));
}

/// An override that no tunable names could not be chosen, and a default that differs would run where nobody chose.
/// Overrides computed from others are no choices.
#[test]
fn tunables_are_the_overrides_and_the_first_value_is_the_default() {
    for kernel in ALL {
        let names: Vec<_> = kernel.tunables.iter().map(|(name, _)| *name).collect();
        let (module, _) = parse(kernel, &kernel.variants()[0]);
        let mut overrides: Vec<_> = module
            .overrides
            .iter()
            .filter_map(|(_, o)| {
                let name = o.name.as_deref()?; // naga makes nameless ones for sizes that are expressions
                match o.init.map(|init| &module.global_expressions[init]) {
                    Some(naga::Expression::Literal(naga::Literal::U32(default))) => Some((name, *default)),
                    Some(naga::Expression::Binary { .. }) => None,
                    init => panic!("{}: override {name} starts as {init:?}", kernel.name),
                }
            })
            .collect();
        overrides.sort_by_key(|(name, _)| names.iter().position(|n| n == name));
        let declared: Vec<_> = kernel.tunables.iter().map(|(name, values)| (*name, values[0])).collect();
        assert_eq!(overrides, declared, "{}: overrides and tunables", kernel.name);
    }
}

#[test]
fn one_op_is_four_files_of_one_name() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for kernel in ALL {
        let name = kernel.name;
        for file in [
            format!("shaders/{name}.wgsl"),
            format!("src/kernels/{name}.rs"),
            format!("src/reference/{name}.rs"),
            format!("tests/device/kernels/{name}.rs"),
        ] {
            assert!(root.join(&file).is_file(), "kernel {name} has no {file}");
        }
    }
    for entry in root.join("shaders").read_dir().expect("shaders/ exists") {
        let path = entry.expect("shaders/ can be read").path();
        if path.is_file() {
            let stem = path.file_stem().and_then(|s| s.to_str()).expect("file names are UTF-8");
            assert!(ALL.iter().any(|kernel| kernel.name == stem), "{path:?} is in no registry entry");
        }
    }
}

/// Tiles of every form that the text takes: one subgroup's worth of columns or many, units that do and do not fill the lanes.
fn tiles() -> Vec<Tile> {
    vec![
        Tile::new(16, 64, 64, 16, 16),
        Tile::new(16, 16, 256, 16, 16),
        Tile { prefetch: false, ..Tile::new(48, 48, 32, 16, 48) },
        Tile { buffers: 2, ..Tile::new(128, 64, 32, 64, 32) },
    ]
}

/// Translated as wgpu does it for a device, and what a device cannot tell before it hangs: workgroup memory.
fn translate(kernel: &Kernel, variant: &Variant, subgroups: u32) {
    let what = format!("{} {variant:?}", kernel.name);
    let (module, info) = parse(kernel, variant);
    let options = naga::back::spv::Options { lang_version: (1, 3), ..Default::default() };
    naga::back::spv::write_vec(&module, &info, &options, None).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert_eq!(module.entry_points[0].workgroup_size, [32 * subgroups, 1, 1], "{what}");
    check_bindings(kernel, &what, &module);
    let immediates = |(_, variable): &(_, &naga::GlobalVariable)| variable.space == AddressSpace::Immediate;
    let (_, params) = module.global_variables.iter().find(immediates).expect("it has parameters");
    assert_same_struct(&what, &module, params.ty, kernel.params, kernel.param_bytes);
    assert!(workgroup_bytes(&module) <= 48 << 10, "{what}: {} bytes of workgroup memory", workgroup_bytes(&module));
}

/// Text, validation and translation of every kernel on cooperative matrices: what a device without them cannot try.
#[test]
fn cooperative_kernels_translate_to_spirv() {
    for kernel in cooperative::ALL {
        let dtypes: &[Dtype] = match kernel.name {
            "cooperative/matmul" => &Dtype::ALL,
            _ => &[Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::Mxfp4],
        };
        let mut tiles = tiles();
        if kernel.name != "cooperative/matmul" {
            tiles.extend([Tile::solo(16, 32, 64, 1), Tile::solo(48, 32, 128, 2), Tile::solo(80, 16, 32, 1)]);
            tiles.extend([Tile::direct(80, 64, 64, 80, 16), Tile::direct(48, 64, 32, 16, 32)]);
        }
        for (tile, dtype) in tiles.iter().flat_map(|tile| dtypes.iter().map(move |dtype| (tile, *dtype))) {
            for (wide, tail) in [(true, false), (true, true), (false, false)] {
                if !wide || dtype != Dtype::Mxfp4 {
                    translate(kernel, &tile.variant(dtype, wide, tail), tile.subgroups());
                }
            }
        }
    }
}

/// The same of prompt attention on cooperative matrices, for head widths of every remainder and all cuts.
#[test]
fn cooperative_prompt_attention_translates_to_spirv() {
    use cooperative::prompt_attention::{Cut, PROMPT_ATTENTION};
    for head_width in [4, 16, 20, 24, 64, 80, 96, 112, 128, 192, 256] {
        let shape = Shape {
            q_heads: 4,
            kv_heads: 1,
            head_width,
            q_stride: 6 * head_width,
            window: 0,
            scale: 1.0,
            has_sinks: false,
        };
        let own = Cut::of(&shape);
        assert!(own.fits(&shape), "width {head_width}");
        let narrow = [1, 2, 4].map(|subgroups| Cut { subgroups, prefetch: false });
        for cut in narrow.into_iter().filter(|cut| cut.subgroups <= own.subgroups).chain([own]) {
            translate(&PROMPT_ATTENTION, &cut.variant(&shape), cut.subgroups);
        }
    }
}

#[test]
fn candidates_are_possible() {
    for operation in Operation::ALL {
        let (kernel, matrices) = match operation {
            Operation::Matmul | Operation::NarrowMatmul => (&cooperative::matmul::MATMUL, 1),
            Operation::GateUp => (&cooperative::expert_gate_up::EXPERT_GATE_UP, 2),
            Operation::Down => (&cooperative::expert_down::EXPERT_DOWN, 1),
        };
        for tile in candidates::all(operation).into_iter().chain(Tiles::default().all(operation)) {
            assert!(tile.is_possible(matrices), "{operation:?}: {tile}");
            translate(kernel, &tile.variant(Dtype::Bf16, true, false), tile.subgroups());
        }
    }
    let too_large = Tile { buffers: 2, ..Tile::new(128, 128, 64, 64, 64) };
    assert!(!too_large.is_possible(1));
}

/// The literal string at the start of `words`, and the words after it.
fn string(words: &[u32]) -> (String, &[u32]) {
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let end = bytes.iter().position(|byte| *byte == 0).expect("strings in SPIR-V end with 0");
    (String::from_utf8(bytes[..end].to_vec()).expect("the text is UTF-8"), &words[end / 4 + 1..])
}

/// What naga says of the kernels in WGSL, of words that no part of wgpu looks at: they were made of the text beside them, its entry point,
/// bindings and parameters are what the Rust side believes, and a workgroup computes what its tile says.
#[test]
fn spirv_is_of_its_text_and_fits_the_rust_side() {
    const MATMUL: &Kernel = &cooperative::matmul::WORKGROUP_MATMUL;
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders/spirv/matmul.comp");
    let text = std::fs::read_to_string(path).expect("the text can be read");
    for dtype in [Dtype::Bf16, Dtype::F16] {
        let words = MATMUL.spirv(dtype).expect("it is SPIR-V");
        assert_eq!(words[0], 0x0723_0203, "{dtype:?}: magic number");
        let (mut source, mut defined, mut entry) = (String::new(), Vec::new(), None);
        let (mut names, mut bindings, mut read_only) = (Vec::new(), Vec::new(), HashSet::new());
        let (mut offsets, mut lanes) = (Vec::new(), 0);
        let mut rest = &words[5..];
        while let Some(first) = rest.first() {
            let (op, length) = (first & 0xffff, (first >> 16) as usize);
            let operands = &rest[1..length];
            match (op, operands) {
                (3, [_, _, _, text @ ..]) => source = string(text).0,
                (2, text) => source.push_str(&string(text).0),
                (330, text) => defined.push(string(text).0),
                (15, [model, _, name @ ..]) => entry = Some((*model, string(name).0)),
                (16, [_, 17, x, y, z]) => lanes = x * y * z,
                (6, [id, member, name @ ..]) => names.push((*id, *member, string(name).0)),
                (71, [id, 33, binding]) => bindings.push((*binding, *id)),
                (71, [_, 34, set]) => assert_eq!(*set, 0, "{dtype:?}: descriptor set"),
                (71, [id, 24]) => assert!(read_only.insert(*id), "{dtype:?}: said twice"),
                (72, [id, member, 35, offset]) => offsets.push((*id, *member, *offset)),
                _ => {}
            }
            rest = &rest[length..];
        }
        // The compiler puts what it was told to define, and line numbers, in front.
        assert!(source.ends_with(&text), "{dtype:?}: the words were made of another text: run shaders/spirv/make");
        let wanted = format!("define-macro {}", dtype.name().to_uppercase());
        assert!(defined.contains(&wanted), "{dtype:?}: {defined:?}");
        assert_eq!(entry, Some((5, "main".to_owned())), "{dtype:?}: entry point");
        bindings.sort_unstable();
        let access = |id| if read_only.contains(id) { Access::Read } else { Access::ReadWrite };
        let bindings: Vec<_> = bindings.iter().map(|(binding, id)| (*binding, access(id))).collect();
        assert_eq!(bindings, (0..).zip(MATMUL.bindings.iter().copied()).collect::<Vec<_>>(), "{dtype:?}: bindings");
        let fields: Vec<_> = MATMUL.params.iter().enumerate().collect();
        for (member, field) in &fields {
            let (id, ..) =
                *names.iter().find(|(_, _, name)| name == field.name).expect("a member has the field's name");
            let wanted = (id, *member as u32, field.offset as u32);
            assert!(offsets.contains(&wanted), "{dtype:?}: {} lies elsewhere", field.name);
        }
        let (of_params, ..) = names.iter().find(|(_, _, name)| name == "n_rows").expect("found above");
        assert_eq!(offsets.iter().filter(|(id, ..)| id == of_params).count(), fields.len(), "{dtype:?}: parameters");
        assert_eq!(lanes, 32 * Tile::WORKGROUP.subgroups(), "{dtype:?}: lanes");
    }
    for (name, value) in
        [("ROWS", Tile::WORKGROUP.rows), ("COLS", Tile::WORKGROUP.cols), ("DEPTH", Tile::WORKGROUP.depth)]
    {
        assert!(text.contains(&format!("const uint {name} = {value};")), "{name} is {value} on the Rust side");
    }
}
