//! Attention of decode rows over the host KV cache: the CPU lane's one job, and one that streams memory.
//!
//! In: per row its query `[H, K]` in f32, how many tokens it sees, and the blocks that hold them. Out: `[H, K]` in f32.
//!
//! The query heads that share a key/value head form a *group*, which reads each K and V once for all its heads, widening them in
//! registers. A context is cut into *spans* at multiples of [`SPAN_TOKENS`]; a span is walked block by block:
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
//! A sink, a score that has no value, is where the largest score and the sum of weights begin. Over 8-bit rows both products are
//! those of integers (`int8`), and two blocks are taken at a time, else the same.
//!
//! Threads take *tasks*, groups of rows, from one list, longest first, each thread naming its next one early so that the first
//! of its bytes are on their way when the last of the present one are used. Where a row's group is much of the work that is left,
//! at the end of the list too, it is several tasks; whoever ends the last of them joins the spans. Which it is changes no bit.
//!
//! Layers, outermost first: [`attend`] checks every bound and shares tasks among threads; a match on the [`Isa`] picks
//! the code; `avx2`, `avx512`, `neon` and `portable` say what registers of floats and integers are; `group` has the algorithm over f16,
//! `int8` over 8-bit integers.
//!
//! Guarantees:
//! * **Row independence**: a row's bits depend on its own query, context and cache contents (and on the level), not on other
//!   rows or threads. Sums run in one order: lanes over columns, tokens in turn, blocks at multiples of [`BLOCK_TOKENS`] (of twice that over
//!   8-bit rows), spans at multiples of [`SPAN_TOKENS`].
//! * NaN in the query or in visible K or V reaches the output as it does in the reference, so that the engine can tell
//!   whose request it was. Slots outside the visible context, NaN or not, have no part in it.
//!
//! Given up: levels do not agree with each other to the last bit: their lanes are of different widths. Over 8-bit rows queries and
//! weights are rounded to 16 bits.

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
use crate::memory::kv_cache::{BLOCK_TOKENS, BlockTable, KEY_GROUP, KvCache};
use crate::model::AttentionShape;
use crate::policy::KvDtype;
use group::{Ahead, Group, Part, Scratch, State};
use int8::STEP_BLOCKS;

/// Where a context is cut: joining two spans costs a hundredth of reading one, and part of the reduction order of a row.
pub const SPAN_TOKENS: usize = 256;

/// A task is this part of what is left for a thread when its turn comes, at most, where contexts allow: so tasks get smaller towards the
/// end, and the last keep the others waiting for a span or so. Not smaller before that: a row whose spans are several tasks has
/// states to be handed over.
const TASK_SHARE: usize = 2;

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
    let form = Form { isa, cache, layer, heads, head_width, scale, sinks };
    let mut rows: Vec<Row> = rows
        .iter_mut()
        .map(|DecodeRow { q, out, context, table }| Row {
            q,
            table,
            visible: shape.first_visible(*context)..*context,
            out: Out(out.as_mut_ptr()),
            first_task: 0,
            task_spans: 0,
            shared: Vec::new(),
        })
        .collect();
    // Stable: neighbours in memory stay together.
    rows.sort_by_key(|row| std::cmp::Reverse(row.visible.len()));
    let n_tasks = divide(&mut rows, kv_heads, threads.current_num_threads());

    let next_task = AtomicUsize::new(0);
    // Every thread is woken at once, where jobs of a scope wake one after the other. One that comes late, because other work held it,
    // finds nothing left to do.
    threads.broadcast(|_| {
        let take = || {
            let number = next_task.fetch_add(1, Ordering::Relaxed);
            (number < n_tasks).then(|| Task::number(number, &rows))
        };
        let mut scratch = Scratch::new(heads, head_width);
        let mut total = State::new(heads, head_width);
        let mut task = take();
        while let Some(now) = task {
            task = take();
            let next = task.as_ref().map_or([Part::default(); STEP_BLOCKS], |Task { row, kv_head, spans }| {
                let group = form.group(row, *kv_head);
                Ahead::fetch_all(group.q.as_ptr().cast(), size_of_val(group.q));
                group.first_parts(row.span(spans.start).start / BLOCK_TOKENS)
            });
            now.run(&form, next, &mut scratch, &mut total);
        }
    });
}

/// Divides every row into tasks, and returns their number. Only rows are touched, for the threads wait meanwhile: what a task is follows
/// from its number ([`Task::number`]).
fn divide(rows: &mut [Row], kv_heads: usize, n_threads: usize) -> usize {
    let mut left: usize = rows.iter().map(|row| row.visible.len()).sum();
    let mut n_tasks = 0;
    for row in rows {
        let spans = row.spans();
        let most_spans = (left * kv_heads / (n_threads * TASK_SHARE) / SPAN_TOKENS).max(1);
        // Parts of equal size.
        row.task_spans = spans.len().div_ceil(spans.len().div_ceil(most_spans));
        row.first_task = n_tasks;
        left -= row.visible.len();
        let parts = row.parts();
        n_tasks += parts * kv_heads;
        if parts > 1 {
            row.shared.extend((0..kv_heads).map(|_| Shared {
                left: AtomicUsize::new(parts),
                states: Mutex::new(spans.clone().map(|_| None).collect()),
            }));
        }
    }
    n_tasks
}

/// What all tasks of a call have in common.
struct Form<'a> {
    isa: Isa,
    cache: &'a KvCache,
    layer: usize,
    /// Of a group.
    heads: usize,
    head_width: usize,
    scale: f32,
    sinks: Option<&'a [f32]>,
}

impl Form<'_> {
    /// All that a row sees, by the query heads of one key/value head.
    fn group<'a>(&'a self, row: &'a Row, kv_head: usize) -> Group<'a> {
        let Form { cache, layer, heads, head_width, scale, .. } = *self;
        Group {
            cache,
            layer,
            table: row.table,
            kv_head,
            visible: row.visible.clone(),
            scale,
            sinks: self.sinks.map_or(&[][..], |sinks| &sinks[kv_head * heads..][..heads]),
            q: &row.q[kv_head * heads * head_width..][..heads * head_width],
            next: [Part::default(); STEP_BLOCKS],
        }
    }
}

struct Row<'a> {
    q: &'a [f32],
    table: &'a BlockTable,
    visible: Range<usize>,
    out: Out,
    /// Number of the first of its tasks: part by part, one key/value head after the other.
    first_task: usize,
    /// Spans of a part, fewer in the last one.
    task_spans: usize,
    /// `[G]`, where a group is several parts.
    shared: Vec<Shared>,
}

/// Where a row's output starts, `[H, K]`. Without a lock: all threads would take it at the same moment, as they begin with a row's groups.
struct Out(*mut f32);

// SAFETY: each group's part is written through it by one thread alone, whoever ends the group's last task, before `attend` returns.
unsafe impl Sync for Out {}

impl Row<'_> {
    fn spans(&self) -> Range<usize> {
        self.visible.start / SPAN_TOKENS..self.visible.end.div_ceil(SPAN_TOKENS)
    }

    fn parts(&self) -> usize {
        self.spans().len().div_ceil(self.task_spans)
    }

    fn span(&self, span: usize) -> Range<usize> {
        self.visible.start.max(span * SPAN_TOKENS)..self.visible.end.min((span + 1) * SPAN_TOKENS)
    }
}

/// Spans of one group of one row.
struct Task<'a> {
    row: &'a Row<'a>,
    kv_head: usize,
    spans: Range<usize>,
}

/// A group whose spans are several tasks.
struct Shared {
    /// Tasks that have not ended.
    left: AtomicUsize,
    states: Mutex<Vec<Option<State>>>,
}

impl<'a> Task<'a> {
    /// Task `number` of all that the rows are [divided](divide) into.
    fn number(number: usize, rows: &'a [Row<'a>]) -> Self {
        let row = &rows[rows.partition_point(|row| row.first_task <= number) - 1];
        let (parts, of_row) = (row.parts(), number - row.first_task);
        let spans = row.spans();
        let start = spans.start + of_row % parts * row.task_spans;
        Self { row, kv_head: of_row / parts, spans: start..(start + row.task_spans).min(spans.end) }
    }

    /// `next`: what this thread reads afterwards.
    fn run(&self, form: &Form, next: [Part; STEP_BLOCKS], scratch: &mut Scratch, total: &mut State) {
        let row = self.row;
        let whole = form.group(row, self.kv_head);
        let out = row.out.0.wrapping_add(self.kv_head * whole.q.len());
        // Written at the end, when it should not have to be fetched first.
        Ahead::fetch_all(out.cast(), size_of_val(whole.q));
        let shared = row.shared.get(self.kv_head);
        for span in self.spans.clone() {
            let visible = row.span(span);
            let goes_on = span + 1 < self.spans.end;
            let next = if goes_on { whole.first_parts(visible.end / BLOCK_TOKENS) } else { next };
            // Sinks come before all tokens.
            let sinks = if visible.start == row.visible.start { whole.sinks } else { &[] };
            let earlier = (shared.is_none() && span > self.spans.start).then_some(&mut *total);
            let joined = earlier.is_some();
            attend_span(form, &Group { visible, sinks, next, ..whole.clone() }, scratch, earlier);
            match shared {
                None if joined => {}
                None => std::mem::swap(total, &mut scratch.state),
                Some(shared) => {
                    let state = std::mem::replace(&mut scratch.state, State::new(form.heads, form.head_width));
                    shared.states.lock().expect("states lock")[span - row.spans().start] = Some(state);
                }
            }
        }
        if let Some(shared) = shared {
            if shared.left.fetch_sub(1, Ordering::AcqRel) > 1 {
                return;
            }
            let mut states = shared.states.lock().expect("states lock");
            let mut states = states.drain(..).map(|state| state.expect("every task has ended"));
            *total = states.next().expect("at least two spans");
            states.for_each(|state| total.merge(&state));
        }
        // SAFETY: this group's part of a row's output, whose length `attend` checked; nobody else is here for this group.
        total.finish(unsafe { std::slice::from_raw_parts_mut(out, whole.q.len()) });
    }
}

/// Attends a span, and joins it to what came before, if that is given.
fn attend_span(form: &Form, group: &Group, scratch: &mut Scratch, earlier: Option<&mut State>) {
    let f16 = form.cache.layout().dtype == KvDtype::F16;
    // SAFETY: `attend` makes the scratch, and the form has the cache's dtype. An `Isa` of a level exists only where
    // `Isa::available` found the features that its functions ask for.
    unsafe {
        match form.isa.level() {
            Level::Portable if f16 => portable::attend_f16(group, scratch, earlier),
            Level::Portable => portable::attend_int8(group, scratch, earlier),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 | Level::Avx2Vnni if f16 => avx2::attend_f16(group, scratch, earlier),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => avx2::attend_int8(group, scratch, earlier),
            #[cfg(target_arch = "x86_64")]
            Level::Avx2Vnni => avx2::attend_int8_vnni(group, scratch, earlier),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 | Level::Avx512Vnni if f16 => avx512::attend_f16(group, scratch, earlier),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => avx512::attend_int8(group, scratch, earlier),
            #[cfg(target_arch = "x86_64")]
            Level::Avx512Vnni => avx512::attend_int8_vnni(group, scratch, earlier),
            #[cfg(target_arch = "aarch64")]
            Level::Neon if f16 => neon::attend_f16(group, scratch, earlier),
            #[cfg(target_arch = "aarch64")]
            Level::Neon => neon::attend_int8(group, scratch, earlier),
        }
    }
}
