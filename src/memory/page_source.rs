//! Where the bytes of pages wait before they cross the link, and how they get into it.
//!
//! | source | what it is | costs |
//! |---|---|---|
//! | imported | anonymous memory in huge pages, filled once from the files past the page cache, lent to the driver | a load |
//! | pinned | memory of the driver, filled once | a load; the driver may allow only a part of the RAM |
//! | mapped | the files' own mapping, lent to the driver | nothing, where the driver takes it (few do) |
//! | staged | a few pinned buffers; each page is read from its file when it is due | a read per page and pass; needs no RAM |
//! | relay | pageable memory, each page copied into pinned memory by the thread that launches: what FlexGen does without pinned weights (PyTorch's allocator hands pinned memory out again, and so does this) | for comparison only |
//!
//! In: weights, a [`PagePlan`], a wish. Out: a [`PageSource`] that starts the copies of any page. Where nobody wished, the best
//! that the machine grants is taken, and [`PageSource::why`] says why not a better one.
//!
//! Guarantees: weights are in RAM at most once (what is read for filling goes past the page cache or is given back); a page's
//! memory is not refilled before its copy has run.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use rayon::prelude::*;

use super::host_memory;
use super::pages::{Page, PagePlan, PageShape, Piece};
use crate::checkpoint::{ReadError, Reader, Weights};
use crate::gpu::{CopyRange, Gpu, GpuError, HostBuffer, HostMemoryRefused, Line, Place, Ticket};
use crate::model::{ExpertMatrix, Role};
use crate::policy::SourceKind;
use crate::units::human_bytes;

/// Largest piece of memory asked for at a time. Drivers refuse larger ones sooner (NVIDIA's limit is about 4 GiB).
const ARENA_BYTES: u64 = 1 << 30;
/// A page's pieces start at multiples of this in their arena.
const PIECE_ALIGNMENT: u64 = 64;
/// Staging buffers of the staged source: one is read into while others cross the link.
pub const STAGING_BUFFERS: usize = 4;
/// Memory is filled, and pages are read, in portions of this size, so that all threads have work.
pub const PORTION_BYTES: u64 = 4 << 20;

/// A page could not be brought.
#[derive(Debug, thiserror::Error)]
pub enum PageError {
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Memory(#[from] HostMemoryRefused),
    #[error("page source {wanted} was asked for: {cause}")]
    Unavailable { wanted: SourceKind, cause: String },
}

/// What the machine is asked for.
pub struct SourceRequest<'a> {
    pub gpu: &'a Arc<Gpu>,
    pub weights: &'a Weights,
    pub plan: &'a PagePlan,
    pub layers: usize,
    /// None: the best there is.
    pub wish: Option<SourceKind>,
    /// Host memory that may be taken for weights, in bytes.
    pub host_bytes: u64,
    pub threads: &'a rayon::ThreadPool,
}

/// See the module's text.
pub struct PageSource {
    kind: SourceKind,
    why: Vec<String>,
    bytes: Bytes,
}

/// Where experts lie in memory, each whole in one arena: however they are cut into pages, they stay where they are.
struct Places {
    /// Arena and offset in it of each expert's first matrix, layer by layer; None: it is not kept here.
    at: Vec<Option<(usize, u64)>>,
    /// Of a layer.
    experts: usize,
    /// Where in an expert its matrices begin.
    matrices: [u64; 3],
}

impl Places {
    /// Cuts the experts that `plan` streams into arenas; also the size of each arena.
    fn new(plan: &PagePlan, layers: usize) -> (Places, Vec<u64>) {
        let PageShape { experts, matrix_bytes, .. } = *plan.shape();
        let (mut matrices, mut size) = ([0; 3], 0);
        for (start, bytes) in matrices.iter_mut().zip(matrix_bytes) {
            *start = size;
            size = (size + bytes).next_multiple_of(PIECE_ALIGNMENT);
        }
        let mut arenas = vec![0u64];
        let mut place = |layer: usize, expert: usize| {
            if plan.stays(layer, expert) {
                return None;
            }
            if arenas.last().is_some_and(|last| *last > 0 && *last + size > ARENA_BYTES) {
                arenas.push(0);
            }
            let index = arenas.len() - 1;
            arenas[index] += size;
            Some((index, arenas[index] - size))
        };
        let at = (0..layers).flat_map(|layer| (0..experts).map(move |expert| (layer, expert)));
        let at = at.map(|(layer, expert)| place(layer, expert)).collect();
        let whole = |bytes: &mut u64| *bytes = bytes.next_multiple_of(4096).max(4096);
        arenas.iter_mut().for_each(whole);
        (Places { at, experts, matrices }, arenas)
    }

    /// Arena and offset of a piece's first byte.
    fn of(&self, layer: usize, piece: &Piece) -> (usize, u64) {
        let (arena, start) = self.at[layer * self.experts + piece.expert].expect("a streamed expert has a place");
        (arena, start + self.matrices[piece.matrix as usize] + piece.bytes.start)
    }

    /// Whatever `plan` streams is here.
    fn cover(&self, plan: &PagePlan) -> bool {
        let layers = self.at.len() / self.experts;
        let here =
            |layer: usize, expert: usize| plan.stays(layer, expert) || self.at[layer * self.experts + expert].is_some();
        plan.shape().experts == self.experts
            && plan.shape().layers == layers
            && (0..layers).all(|layer| (0..self.experts).all(|expert| here(layer, expert)))
    }
}

enum Bytes {
    Resident {
        arenas: Vec<HostBuffer>,
        places: Places,
    },
    /// Each file's mapping, cut into arenas.
    Mapped {
        files: HashMap<std::path::PathBuf, Vec<HostBuffer>>,
    },
    Staged {
        buffers: Mutex<Vec<(HostBuffer, Option<Ticket>)>>,
        reader: Reader,
    },
    Relay {
        arenas: Vec<HostBuffer>,
        places: Places,
        relayed: Mutex<Relayed>,
    },
}

/// Pinned memory of pages on their way.
#[derive(Default)]
struct Relayed {
    /// By page, those whose copies are still to be launched. A page of the next pass may be pinned before this pass's is loaded:
    /// first in, first out.
    pinned: HashMap<usize, VecDeque<HostBuffer>>,
    /// Those whose copies were launched.
    launched: VecDeque<(HostBuffer, Ticket)>,
}

/// Offset of each piece within its page, and the page's size.
fn lay_out(page: &Page) -> (Vec<u64>, u64) {
    let mut end = 0u64;
    let offsets = page
        .pieces
        .iter()
        .map(|piece| {
            let start = end;
            end = (end + piece.bytes.end - piece.bytes.start).next_multiple_of(PIECE_ALIGNMENT);
            start
        })
        .collect();
    (offsets, end)
}

/// All pages of a layer, in order of use.
fn layer_pages(plan: &PagePlan) -> Vec<&Page> {
    plan.chunks().iter().flat_map(|chunk| &chunk.pages).collect()
}

/// A mapping of `bytes` that starts at a page's boundary, in huge pages where the system gives them.
fn anonymous(bytes: u64) -> Result<memmap2::MmapMut, HostMemoryRefused> {
    let refused = |cause: std::io::Error| HostMemoryRefused {
        what: "memory for expert pages".to_owned(),
        needed: bytes,
        cause: cause.to_string(),
    };
    let map = memmap2::MmapMut::map_anon(bytes as usize).map_err(refused)?;
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage); // only advice: small pages work, a little slower
    Ok(map)
}

/// A stretch of memory that portions are written to from many threads.
#[derive(Clone, Copy)]
struct Memory(*mut u8);
// SAFETY: portions are disjoint.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

/// One portion of a piece: what to read, and where to.
struct Portion {
    role: Role,
    range: Range<u64>,
    to: Memory,
}

/// What fills a piece that starts at `start`, which has room for it: the bytes of tensors that it is made of.
fn portions(weights: &Weights, layer: usize, piece: &Piece, start: *mut u8) -> Vec<Portion> {
    let mut out = Vec::new();
    for source in weights.inventory().slot_sources(layer, piece.expert, piece.matrix, piece.bytes.clone()) {
        let first = source.at - piece.bytes.start;
        let mut from = source.range.start;
        while from < source.range.end {
            let to = (from + PORTION_BYTES).min(source.range.end);
            // SAFETY: sources lie within their piece.
            let at = unsafe { start.add((first + from - source.range.start) as usize) };
            out.push(Portion { role: source.role, range: from..to, to: Memory(at) });
            from = to;
        }
    }
    out
}

fn read_all(
    weights: &Weights,
    reader: &Reader,
    threads: &rayon::ThreadPool,
    portions: Vec<Portion>,
) -> Result<(), ReadError> {
    threads.install(|| {
        portions.into_par_iter().try_for_each(|Portion { role, range, to }| {
            // SAFETY: portions are disjoint stretches of memory that this call has to itself.
            let into = unsafe { std::slice::from_raw_parts_mut({ to }.0, (range.end - range.start) as usize) };
            weights.read(reader, role, range, into)
        })
    })
}

impl PageSource {
    /// Opens the wished source, or the best there is. `progress(done, total)` in bytes.
    pub fn open(request: &SourceRequest<'_>, progress: &mut dyn FnMut(u64, u64)) -> Result<PageSource, PageError> {
        let mut why = Vec::new();
        let kinds = match request.wish {
            Some(kind) => vec![kind],
            None => vec![SourceKind::Imported, SourceKind::Pinned, SourceKind::Mapped, SourceKind::Staged],
        };
        let last = kinds.len() - 1;
        for (index, kind) in kinds.into_iter().enumerate() {
            match Self::open_kind(request, kind, progress) {
                Ok(bytes) => return Ok(PageSource { kind, why, bytes }),
                Err(PageError::Read(error)) => return Err(error.into()),
                Err(error) if index == last => {
                    return Err(match request.wish {
                        Some(wanted) => PageError::Unavailable { wanted, cause: error.to_string() },
                        None => error,
                    });
                }
                Err(error) => {
                    tracing::info!(source = %kind, %error, "page source refused");
                    why.push(format!("not {kind}: {error}"));
                }
            }
        }
        unreachable!("the last kind returns")
    }

    fn open_kind(
        request: &SourceRequest<'_>,
        kind: SourceKind,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Bytes, PageError> {
        match kind {
            SourceKind::Imported | SourceKind::Pinned => Self::fill(request, kind, progress),
            SourceKind::Mapped => Self::map(request),
            SourceKind::Staged => {
                let largest = layer_pages(request.plan).iter().map(|page| lay_out(page).1).max().unwrap_or(4);
                let buffer = |_| Ok((request.gpu.pinned("staging buffer", largest)?, None));
                let buffers = (0..STAGING_BUFFERS).map(buffer).collect::<Result<Vec<_>, HostMemoryRefused>>()?;
                Ok(Bytes::Staged { buffers: Mutex::new(buffers), reader: Reader::new() })
            }
            SourceKind::Relay => {
                Self::enough_memory(request)?;
                let (places, sizes) = Places::new(request.plan, request.layers);
                let mut arenas = sizes.iter().map(|bytes| anonymous(*bytes)).collect::<Result<Vec<_>, _>>()?;
                let starts: Vec<Memory> = arenas.iter_mut().map(|arena| Memory(arena.as_mut_ptr())).collect();
                Self::fill_arenas(request, &starts, &places, progress)?;
                let arenas = arenas.into_iter().map(HostBuffer::of).collect();
                Ok(Bytes::Relay { arenas, places, relayed: Mutex::default() })
            }
        }
    }

    /// Weights in memory must leave the system alive.
    fn enough_memory(request: &SourceRequest<'_>) -> Result<(), PageError> {
        // Padding of pieces and arenas is a few parts in a million, and not counted.
        let needed = request.plan.bytes_per_pass();
        let there = request.host_bytes.min(host_memory::available_bytes().unwrap_or(u64::MAX));
        if needed > there {
            let cause = format!("{} are left for weights (--host-memory sets it)", human_bytes(there));
            return Err(HostMemoryRefused { what: "memory for expert pages".to_owned(), needed, cause }.into());
        }
        Ok(())
    }

    fn fill(
        request: &SourceRequest<'_>,
        kind: SourceKind,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Bytes, PageError> {
        Self::enough_memory(request)?;
        let (places, sizes) = Places::new(request.plan, request.layers);
        // Importing pins, and so touches, every page of memory: from many threads it is touched faster by filling it first.
        // Whether the driver imports at all is asked with a small piece.
        if kind == SourceKind::Imported {
            let probe = Arc::new(anonymous(4096)?);
            // SAFETY: the mapping is as long as that, and `probe` keeps it.
            unsafe { request.gpu.import("a probe", probe.as_ptr().cast_mut(), 4096, probe.clone())? };
        }
        let mut maps = Vec::new();
        let mut arenas = Vec::new();
        for bytes in &sizes {
            match kind {
                SourceKind::Imported => maps.push(anonymous(*bytes)?),
                _ => arenas.push(request.gpu.pinned("memory for expert pages", *bytes)?),
            }
        }
        let starts: Vec<Memory> = match kind {
            SourceKind::Imported => maps.iter_mut().map(|map| Memory(map.as_mut_ptr())).collect(),
            // SAFETY: nobody else knows of this memory yet.
            _ => arenas.iter().map(|arena| Memory(unsafe { arena.slice_mut::<u8>(0..4) }.as_mut_ptr())).collect(),
        };
        Self::fill_arenas(request, &starts, &places, progress)?;
        for map in maps {
            let (start, bytes) = (map.as_ptr().cast_mut(), map.len() as u64);
            // SAFETY: the mapping is that long, moves with its owner, and nobody writes it any more.
            arenas.push(unsafe { request.gpu.import("expert pages", start, bytes, Arc::new(map))? });
        }
        Ok(Bytes::Resident { arenas, places })
    }

    fn fill_arenas(
        request: &SourceRequest<'_>,
        starts: &[Memory],
        places: &Places,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), PageError> {
        let reader = Reader::new();
        let PageShape { experts, matrix_bytes, .. } = *request.plan.shape();
        let total = request.plan.bytes_per_pass();
        let mut done = 0;
        for layer in 0..request.layers {
            let mut work = Vec::new();
            for expert in (0..experts).filter(|expert| !request.plan.stays(layer, *expert)) {
                for (matrix, bytes) in ExpertMatrix::ALL.into_iter().zip(matrix_bytes).filter(|(_, bytes)| *bytes > 0) {
                    let piece = Piece { expert, matrix, bytes: 0..bytes };
                    let (arena, offset) = places.of(layer, &piece);
                    // SAFETY: the matrix was placed within its arena.
                    let start = unsafe { starts[arena].0.add(offset as usize) };
                    work.extend(portions(request.weights, layer, &piece, start));
                    done += bytes;
                }
            }
            read_all(request.weights, &reader, request.threads, work)?;
            progress(done, total);
        }
        Ok(())
    }

    fn map(request: &SourceRequest<'_>) -> Result<Bytes, PageError> {
        let unavailable = |cause: &str| PageError::Unavailable { wanted: SourceKind::Mapped, cause: cause.to_owned() };
        let checkpoint = request.weights.files().ok_or_else(|| unavailable("made-up weights lie in no file"))?;
        let mut files = HashMap::new();
        for (path, map) in checkpoint.mappings() {
            let whole = (map.len() as u64).next_multiple_of(4096);
            let mut arenas = Vec::new();
            for start in (0..whole).step_by(ARENA_BYTES as usize) {
                let bytes = (whole - start).min(ARENA_BYTES);
                // SAFETY: a mapping reaches to the end of its last page; `map` is its owner.
                let arena = unsafe {
                    let pointer = map.as_ptr().cast_mut().add(start as usize);
                    request.gpu.import("a mapped file", pointer, bytes, map.clone())?
                };
                arenas.push(arena);
            }
            files.insert(path.to_owned(), arenas);
        }
        Ok(Bytes::Mapped { files })
    }

    pub fn kind(&self) -> SourceKind {
        self.kind
    }

    /// What pages of `plan` are made of is here, however it was cut before.
    pub fn serves(&self, plan: &PagePlan) -> bool {
        match &self.bytes {
            Bytes::Resident { places, .. } | Bytes::Relay { places, .. } => places.cover(plan),
            Bytes::Mapped { .. } => true,
            // Its buffers are as large as the largest page was.
            Bytes::Staged { buffers, .. } => {
                let largest = layer_pages(plan).iter().map(|page| lay_out(page).1).max().unwrap_or(0);
                buffers.lock().expect("staging lock").iter().all(|(buffer, _)| buffer.size() >= largest)
            }
        }
    }

    /// Copies `pieces` of an expert to where `target` says, if it is kept where copies reach it.
    pub fn load_expert<'a>(
        &self,
        gpu: &Gpu,
        layer: usize,
        pieces: &[Piece],
        target: impl Fn(&Piece) -> Place<'a>,
    ) -> Result<Option<Ticket>, GpuError> {
        let Bytes::Resident { arenas, places } = &self.bytes else { return Ok(None) };
        if pieces.iter().any(|piece| places.at[layer * places.experts + piece.expert].is_none()) {
            return Ok(None);
        }
        let copy = |piece: &Piece| {
            let (arena, offset) = places.of(layer, piece);
            let bytes = (piece.bytes.end - piece.bytes.start).next_multiple_of(4);
            CopyRange::new(arenas[arena].at(offset), target(piece), bytes)
        };
        gpu.copy(Line::ToDevice, &by_ends(pieces.iter().map(copy).collect()), &[]).map(Some)
    }

    /// The same bytes used in another way: memory that was lent or pinned can be relayed, and the other way round.
    pub fn used_as(self, kind: SourceKind) -> Result<PageSource, PageError> {
        use SourceKind::{Imported, Pinned, Relay};
        let bytes = match (self.bytes, kind) {
            (bytes, kind) if kind == self.kind => bytes,
            (Bytes::Resident { arenas, places }, Relay) => Bytes::Relay { arenas, places, relayed: Mutex::default() },
            // What was never lent has no name for copies.
            (Bytes::Relay { arenas, places, .. }, Imported | Pinned)
                if arenas.iter().all(HostBuffer::reached_by_copies) =>
            {
                Bytes::Resident { arenas, places }
            }
            _ => {
                let cause = format!("the weights are {} and would have to be loaded again", self.kind);
                return Err(PageError::Unavailable { wanted: kind, cause });
            }
        };
        Ok(PageSource { kind, why: self.why, bytes })
    }

    /// Why each better source was not taken.
    pub fn why(&self) -> &[String] {
        &self.why
    }

    /// Copies page `number` of a layer when `after` has been reached: each piece to where `target` says.
    pub fn load<'a>(
        &self,
        request: &LoadRequest<'_>,
        target: impl Fn(&Piece) -> Place<'a>,
        after: &[Ticket],
    ) -> Result<Ticket, PageError> {
        let LoadRequest { gpu, weights, plan, threads, layer, number } = *request;
        let pages = layer_pages(plan);
        let page = pages[number];
        let (offsets, bytes) = lay_out(page);
        // A piece's last bytes may be no whole word; what is copied beyond them is never read.
        let length = |piece: &Piece| (piece.bytes.end - piece.bytes.start).next_multiple_of(4);
        // Of buffers that hold a page's pieces one after the other.
        let from_buffer = |buffer: &HostBuffer, start: u64| -> Result<Ticket, GpuError> {
            let copies: Vec<CopyRange<'_>> = page
                .pieces
                .iter()
                .zip(&offsets)
                .map(|(piece, offset)| CopyRange::new(buffer.at(start + offset), target(piece), length(piece)))
                .collect();
            gpu.copy(Line::ToDevice, &by_ends(copies), after)
        };
        match &self.bytes {
            Bytes::Resident { arenas, places } => {
                let copy = |piece: &Piece| {
                    let (arena, offset) = places.of(layer, piece);
                    CopyRange::new(arenas[arena].at(offset), target(piece), length(piece))
                };
                Ok(gpu.copy(Line::ToDevice, &by_ends(page.pieces.iter().map(copy).collect()), after)?)
            }
            Bytes::Mapped { files } => {
                let checkpoint = weights.files().expect("the mapping is of files");
                let mut copies = Vec::new();
                for piece in &page.pieces {
                    let to = target(piece);
                    let inventory = weights.inventory();
                    for source in inventory.slot_sources(layer, piece.expert, piece.matrix, piece.bytes.clone()) {
                        let tensor = checkpoint.tensor(source.role);
                        let arenas = &files[tensor.path];
                        let (mut from, end) =
                            (tensor.range.start + source.range.start, tensor.range.start + source.range.end);
                        let mut done = source.at - piece.bytes.start;
                        while from < end {
                            let (arena, offset) = ((from / ARENA_BYTES) as usize, from % ARENA_BYTES);
                            let bytes = (end - from).min(ARENA_BYTES - offset);
                            copies.push(CopyRange::new(arenas[arena].at(offset), to.plus(done), bytes));
                            (from, done) = (from + bytes, done + bytes);
                        }
                    }
                }
                Ok(gpu.copy(Line::ToDevice, &by_ends(copies), after)?)
            }
            Bytes::Staged { buffers, reader } => {
                let mut buffers = buffers.lock().expect("staging lock");
                // The one whose copy was started first.
                buffers.rotate_left(1);
                let (buffer, busy) = buffers.last_mut().expect("there are staging buffers");
                if let Some(ticket) = busy.take() {
                    gpu.wait_for(ticket)?;
                }
                // SAFETY: the buffer's last copy has run, and this lock keeps others out.
                let start = unsafe { buffer.slice_mut::<u8>(0..bytes) }.as_mut_ptr();
                // SAFETY: `lay_out` gave each piece room in the page.
                let at = |offset: &u64| unsafe { start.add(*offset as usize) };
                let pieces = page.pieces.iter().zip(&offsets);
                let work = pieces.flat_map(|(piece, offset)| portions(weights, layer, piece, at(offset))).collect();
                read_all(weights, reader, threads, work)?;
                let ticket = from_buffer(buffer, 0)?;
                *busy = Some(ticket);
                Ok(ticket)
            }
            Bytes::Relay { relayed, .. } => {
                let key = layer * pages.len() + number;
                let pinned = relayed.lock().expect("relay lock").pinned.get_mut(&key).and_then(VecDeque::pop_front);
                let buffer = pinned.expect("the schedule pins before it loads");
                let ticket = from_buffer(&buffer, 0)?;
                relayed.lock().expect("relay lock").launched.push_back((buffer, ticket));
                Ok(ticket)
            }
        }
    }

    /// Relay: copies a page into pinned memory, on the calling thread.
    pub fn pin(&self, request: &LoadRequest<'_>) -> Result<(), PageError> {
        let Bytes::Relay { arenas, places, relayed } = &self.bytes else { return Ok(()) };
        let pages = layer_pages(request.plan);
        let key = request.layer * pages.len() + request.number;
        // Memory whose copy was launched a layer ago is used again, if pages are not cut larger than they were then. What was launched
        // runs by itself, so waiting for it blocks nobody.
        let largest = pages.iter().map(|page| lay_out(page).1).max().expect("there is a page");
        let used = {
            let launched = &mut relayed.lock().expect("relay lock").launched;
            if launched.len() > pages.len() { launched.pop_front() } else { None }
        };
        let buffer = match used.filter(|(buffer, _)| buffer.size() >= largest) {
            Some((buffer, ticket)) => {
                request.gpu.wait_for(ticket)?;
                buffer
            }
            None => request.gpu.pinned("a relayed page", largest)?,
        };
        let page = pages[request.number];
        for (piece, to) in page.pieces.iter().zip(lay_out(page).0) {
            let (arena, from) = places.of(request.layer, piece);
            let length = piece.bytes.end - piece.bytes.start;
            // SAFETY: the last copy out of this buffer has run and nobody else knows of it now; nobody writes what was filled.
            let (into, from) =
                unsafe { (buffer.slice_mut::<u8>(to..to + length), arenas[arena].slice::<u8>(from..from + length)) };
            into.copy_from_slice(from);
        }
        relayed.lock().expect("relay lock").pinned.entry(key).or_default().push_back(buffer);
        Ok(())
    }
}

/// Copies between the same ends side by side, so that they become one command.
fn by_ends(mut copies: Vec<CopyRange<'_>>) -> Vec<CopyRange<'_>> {
    copies.sort_by_key(CopyRange::ends);
    copies
}

/// Which page, and what it takes to bring it.
#[derive(Clone, Copy)]
pub struct LoadRequest<'a> {
    pub gpu: &'a Gpu,
    pub weights: &'a Weights,
    pub plan: &'a PagePlan,
    pub threads: &'a rayon::ThreadPool,
    /// Below L.
    pub layer: usize,
    /// Of the layer's pages, over all chunks.
    pub number: usize,
}
