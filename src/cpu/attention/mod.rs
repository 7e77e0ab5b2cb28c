//! Attention of decode rows over the host KV cache: the CPU lane's one job, and one that streams memory.
//!
//! In: per row its query `[H, K]` in f32, how many tokens it sees, and the blocks that hold them. Out: `[H, K]` in f32.
//!
//! The query heads that share a key/value head form a *group*, which reads each K and V once for all its heads, widening f16 or
//! 8-bit integers in registers. A context is cut into *spans* at multiples of [`SPAN_TOKENS`]; a span is walked block by block:
//!
//! ```text
//! block by block:   scores = q · K           [heads, 32]   tiles of heads × tokens in registers
//!                   m' = max(m, scores)      earlier sums are rescaled by exp(m - m')
//!                   weights = exp(scores - m')
//!                   out += weights · V       [heads, K]    tiles of heads × columns in registers
//! span by span:     the same rescaling joins what the spans have found, in their order
//! at the end:       out / sum of weights
//! ```
//!
//! A sink, a score that has no value, is where the largest score and the sum of weights begin. Scales of 8-bit rows join the
//! scores and the weights, one multiplication for a row.
//!
//! Threads take *tasks*, groups of rows, from one list, longest first, each thread naming its next one early so that the first
//! of its bytes are on their way when the last of the present one are used. Where a row's group is much of all work, it is as
//! many tasks as threads can share; whoever ends the last of them joins the spans. Which it is changes no bit.
//!
//! Layers, outermost first: [`attend`] checks every bound and shares tasks among threads; a match on the [`Isa`] picks
//! the code; `avx2`, `avx512`, `neon` and `portable` say what a register of lanes is; `group` has the algorithm, once.
//!
//! Guarantees:
//! * **Row independence**: a row's bits depend on its own query, context and cache contents (and on the level), not on other
//!   rows or threads. Sums run in one order: lanes over columns, tokens in turn, blocks at multiples of [`BLOCK_TOKENS`], spans
//!   at multiples of [`SPAN_TOKENS`].
//! * NaN in the query or in visible K or V reaches the output as it does in the reference, so that the engine can tell
//!   whose request it was. Slots outside the visible context are not read.
//!
//! Given up: levels do not agree with each other to the last bit: their lanes are of different widths.

mod group;
mod int8;
mod portable;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::isa::{Isa, Level};
use crate::memory::kv_cache::{BLOCK_TOKENS, BlockTable, KvCache};
use crate::model::AttentionShape;
use crate::policy::KvDtype;
use group::{Group, Scratch, State};

/// Where a context is cut: joining two spans costs a hundredth of reading one, and part of the reduction order of a row.
pub const SPAN_TOKENS: usize = 512;

/// Tasks that a thread has at least, where contexts allow: the last of them to end keeps others waiting for a share of a
/// sixteenth.
const TASKS_PER_THREAD: usize = 16;

/// One decode row to attend.
#[derive(Debug)]
pub struct DecodeRow<'a> {
    /// `[H, K]`
    pub q: &'a [f32],
    /// `[H, K]`, overwritten.
    pub out: &'a mut [f32],
    /// Tokens of the sequence up to and with this row's own, whose K and V are in the cache already. At least 1.
    pub context: usize,
    pub table: &'a BlockTable,
}

/// Attends all `rows` in one layer of the cache, on all threads of `threads`. `sinks`: `[H]`, a score of each query head that
/// joins its softmax and has no value.
pub fn attend(
    isa: Isa,
    cache: &KvCache,
    layer: usize,
    shape: &AttentionShape,
    sinks: Option<&[f32]>,
    rows: &mut [DecodeRow],
    threads: &rayon::ThreadPool,
) {
    let AttentionShape { q_heads, kv_heads, head_width, window, scale } = *shape;
    let layout = cache.layout();
    assert_eq!((kv_heads, head_width), (layout.kv_heads, layout.head_width), "attention and cache differ in [G, K]");
    assert!(q_heads > 0 && q_heads.is_multiple_of(kv_heads), "{kv_heads} KV heads do not divide {q_heads} query heads");
    assert_ne!(window, Some(0), "a window of 0 tokens hides the row itself");
    assert!(sinks.is_none_or(|sinks| sinks.len() == q_heads), "a sink for each of {q_heads} query heads");
    for row in rows.iter() {
        assert_eq!(row.q.len(), q_heads * head_width, "elements of a query row");
        assert_eq!(row.out.len(), q_heads * head_width, "elements of an output row");
        let capacity = row.table.capacity_tokens();
        assert!((1..=capacity).contains(&row.context), "context {} of a table of {capacity} tokens", row.context);
    }

    let heads = shape.heads_per_group();
    let form = Form { isa, dtype: layout.dtype, heads, head_width };
    let n_threads = threads.current_num_threads();
    let visible = |context: usize| shape.first_visible(context)..context;
    let tokens: usize = rows.iter().map(|row| visible(row.context).len()).sum();
    let most_spans = (tokens * kv_heads / (n_threads * TASKS_PER_THREAD) / SPAN_TOKENS).max(1);

    let mut tasks = Vec::with_capacity(rows.len() * kv_heads);
    let mut shared = Vec::new();
    for row in rows.iter_mut() {
        let DecodeRow { q, context, table, .. } = *row;
        let visible = visible(context);
        let all_spans = visible.start / SPAN_TOKENS..context.div_ceil(SPAN_TOKENS);
        let groups = row.out.chunks_exact_mut(heads * head_width).zip(q.chunks_exact(heads * head_width));
        for (kv_head, (out, q)) in groups.enumerate() {
            let sinks = sinks.map_or(&[][..], |sinks| &sinks[kv_head * heads..][..heads]);
            let visible = visible.clone();
            let group = Group { cache, layer, table, kv_head, visible, scale, sinks, q, next: &[] };
            if all_spans.len() <= most_spans {
                tasks.push(Task { group, spans: all_spans.clone(), to: Target::Out(Mutex::new(out)) });
                continue;
            }
            for start in all_spans.clone().step_by(most_spans) {
                let spans = start..(start + most_spans).min(all_spans.end);
                tasks.push(Task { group: group.clone(), spans, to: Target::Shared(shared.len()) });
            }
            shared.push(Shared {
                left: AtomicUsize::new(all_spans.len().div_ceil(most_spans)),
                first_span: all_spans.start,
                states: Mutex::new(all_spans.clone().map(|_| None).collect()),
                out: Mutex::new(out),
            });
        }
    }
    // Stable: groups of one row, whose blocks are neighbours in memory, stay together.
    tasks.sort_by_key(|task| std::cmp::Reverse(task.tokens()));

    let next_task = AtomicUsize::new(0);
    let work = || {
        let take = || tasks.get(next_task.fetch_add(1, Ordering::Relaxed));
        let mut scratch = Scratch::new(heads, head_width);
        let mut total = State::new(heads, head_width);
        let mut task = take();
        while let Some(now) = task {
            task = take();
            let next = task.map_or(&[][..], |task| task.group.halves(task.first_block()).0);
            now.run(&form, next, &mut scratch, &mut total, &shared);
        }
    };
    // Any thread may take up these; one that comes late, because other work held it, finds nothing left to do.
    threads.scope(|scope| {
        for _ in 0..n_threads.min(tasks.len()) {
            scope.spawn(|_| work());
        }
    });
}

/// What all tasks of a call have in common.
struct Form {
    isa: Isa,
    dtype: KvDtype,
    heads: usize,
    head_width: usize,
}

/// Spans of one group of one row.
struct Task<'a> {
    /// With the whole of what the row sees.
    group: Group<'a>,
    spans: Range<usize>,
    to: Target<'a>,
}

enum Target<'a> {
    /// All spans of the group: its output. Only this task locks it.
    Out(Mutex<&'a mut [f32]>),
    /// Some of them: the states go to this [`Shared`].
    Shared(usize),
}

/// A group whose spans are several tasks.
struct Shared<'a> {
    /// Tasks that have not ended.
    left: AtomicUsize,
    first_span: usize,
    states: Mutex<Vec<Option<State>>>,
    out: Mutex<&'a mut [f32]>,
}

impl Task<'_> {
    fn span(&self, span: usize) -> Range<usize> {
        let visible = &self.group.visible;
        visible.start.max(span * SPAN_TOKENS)..visible.end.min((span + 1) * SPAN_TOKENS)
    }

    fn tokens(&self) -> usize {
        self.span(self.spans.end - 1).end - self.span(self.spans.start).start
    }

    fn first_block(&self) -> usize {
        self.span(self.spans.start).start / BLOCK_TOKENS
    }

    /// `next`: what this thread reads afterwards.
    fn run(&self, form: &Form, next: &[u8], scratch: &mut Scratch, total: &mut State, shared: &[Shared]) {
        for span in self.spans.clone() {
            let visible = self.span(span);
            let goes_on = span + 1 < self.spans.end;
            let next = if goes_on { self.group.halves(visible.end / BLOCK_TOKENS).0 } else { next };
            // Sinks come before all tokens.
            let sinks = if visible.start == self.group.visible.start { self.group.sinks } else { &[] };
            let group = Group { visible, sinks, next, ..self.group.clone() };
            attend_span(form, &group, scratch);
            match &self.to {
                Target::Out(_) if span == self.spans.start => std::mem::swap(total, &mut scratch.state),
                Target::Out(_) => total.merge(&scratch.state),
                Target::Shared(index) => {
                    let state = std::mem::replace(&mut scratch.state, State::new(form.heads, form.head_width));
                    let shared = &shared[*index];
                    shared.states.lock().expect("states lock")[span - shared.first_span] = Some(state);
                }
            }
        }
        match &self.to {
            Target::Out(out) => total.finish(&mut out.lock().expect("output lock")),
            Target::Shared(index) => {
                let shared = &shared[*index];
                if shared.left.fetch_sub(1, Ordering::AcqRel) == 1 {
                    let mut states = shared.states.lock().expect("states lock");
                    let mut states = states.drain(..).map(|state| state.expect("every task has ended"));
                    let mut total = states.next().expect("at least two spans");
                    states.for_each(|state| total.merge(&state));
                    total.finish(&mut shared.out.lock().expect("output lock"));
                }
            }
        }
    }
}

fn attend_span(form: &Form, group: &Group, scratch: &mut Scratch) {
    let f16 = form.dtype == KvDtype::F16;
    // SAFETY: `attend` makes the scratch, and the form has the cache's dtype. An `Isa` of a level exists only where
    // `Isa::available` found the features that its functions ask for.
    unsafe {
        match form.isa.level() {
            Level::Portable if f16 => portable::attend_f16(group, scratch),
            Level::Portable => portable::attend_int8(group, scratch),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::AvxVnni if f16 => avx2::attend_f16(group, scratch),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::attend_int8(group, scratch),
            #[cfg(target_arch = "x86_64")]
            Level::AvxVnni => avx2::attend_int8_vnni(group, scratch),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Vnni if f16 => avx512::attend_f16(group, scratch),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::attend_int8(group, scratch),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => avx512::attend_int8_vnni(group, scratch),
            #[cfg(target_arch = "aarch64")]
            Level::Neon if f16 => neon::attend_f16(group, scratch),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => neon::attend_int8(group, scratch),
        }
    }
}
