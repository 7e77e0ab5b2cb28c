//! Copies between host and device.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use super::disk::Files;
use super::{CalibrateError, Request, grid, steady};
use crate::gpu::{Buffer, CopyRange, Gpu, GpuError, HostBuffer, Line, Ticket};
use crate::policy::SourceKind;
use crate::profile::{Curve, Link, PageCurve};

/// Where copies start and end: more host memory than caches hold, and room on the device.
pub struct Copies {
    gpu: Arc<Gpu>,
    /// By page source, best first.
    arenas: Vec<(SourceKind, HostBuffer)>,
    device: Buffer,
    /// What copies to the host write.
    back: HostBuffer,
    /// Bytes of the pages that other work is measured beside.
    page_bytes: u64,
    /// What one takes alone, once it is measured.
    page_seconds: f64,
    /// Offset of the next copy: the one after the last.
    next: AtomicU64,
}

/// Pages of this size are what other work is measured beside, so many of them on their way at a time.
const PAGE_BYTES: u64 = 32 << 20;
const PAGES_AHEAD: usize = 8;

impl Copies {
    /// `files`: what mappings are tried with.
    pub fn open(request: &Request<'_>, files: Option<&Files>) -> Result<Copies, CalibrateError> {
        let gpu = request.gpu.clone();
        let most: u64 = if request.software() { 64 << 20 } else { 1 << 30 };
        let bytes = most.min(request.host_bytes / 8).max(1 << 20) / 4096 * 4096;
        let mut arenas = Vec::new();
        match memmap2::MmapMut::map_anon(bytes as usize) {
            Ok(mut map) => {
                map.fill(1); // pages that nothing has written are all one page of zeros
                let pointer = map.as_mut_ptr();
                // SAFETY: the mapping starts at a page, is that long and is kept; nothing writes it any more.
                let imported = unsafe { gpu.import("memory to copy from", pointer, bytes, Arc::new(map)) };
                arenas.extend(imported.ok().map(|arena| (SourceKind::Imported, arena)));
            }
            Err(error) => tracing::debug!(%error, "no anonymous memory to lend to the driver"),
        }
        let pinned = gpu.pinned("memory to copy from", bytes)?;
        // SAFETY: nothing reads it yet.
        unsafe { pinned.slice_mut::<u8>(0..bytes).fill(1) };
        arenas.push((SourceKind::Pinned, pinned));
        // Drivers of discrete cards refuse mapped pages, and after NVIDIA's was asked for them it refused device memory as well.
        match files.filter(|_| gpu.summary().kind != "discrete").map(|files| files.mapping(bytes)) {
            Some(Ok(map)) if !map.is_empty() => {
                let (pointer, bytes) = (map.as_ptr().cast_mut(), map.len() as u64);
                // SAFETY: the mapping starts at a page, is that long and is kept; nobody writes the file.
                let mapped = unsafe { gpu.import("a mapped file", pointer, bytes, Arc::new(map)) };
                arenas.extend(mapped.ok().map(|arena| (SourceKind::Mapped, arena)));
            }
            _ => tracing::debug!("no file to lend to the driver"),
        }
        let room = (256 << 20).min(gpu.max_binding_bytes()).min(request.device_bytes / 8).min(bytes) / 4096 * 4096;
        let device = gpu.shared_buffer("memory to copy to", room)?;
        let back = gpu.pinned("memory to copy back to", room)?;
        Ok(Copies {
            gpu,
            arenas,
            device,
            back,
            page_bytes: PAGE_BYTES.min(room / 2),
            page_seconds: 0.0,
            next: AtomicU64::new(0),
        })
    }

    /// Largest copy.
    fn room(&self) -> u64 {
        self.device.size()
    }

    /// Starts one copy to the device from cold memory.
    fn start(&self, arena: &HostBuffer, bytes: u64) -> Result<Ticket, GpuError> {
        let at = self.next.fetch_add(bytes.next_multiple_of(4096), Relaxed) % (arena.size() - bytes + 1) / 4096 * 4096;
        let to = at % (self.room() - bytes + 1) / 4096 * 4096;
        self.gpu.copy(Line::ToDevice, &[CopyRange::new(arena.at(at), self.device.at(to), bytes)], &[])
    }

    fn start_back(&self, bytes: u64) -> Result<Ticket, GpuError> {
        let at = self.next.fetch_add(bytes.next_multiple_of(4096), Relaxed) % (self.room() - bytes + 1) / 4096 * 4096;
        self.gpu.copy(Line::ToHost, &[CopyRange::new(self.device.at(at), self.back.at(at), bytes)], &[])
    }

    /// `n` copies one after the other, waited for.
    fn run(&self, n: usize, mut start: impl FnMut() -> Result<Ticket, GpuError>) -> Result<(), GpuError> {
        let mut last = None;
        for _ in 0..n {
            last = Some(start()?);
        }
        last.map_or(Ok(()), |ticket| self.gpu.wait_for(ticket))
    }

    pub fn measure(&mut self, request: &Request<'_>) -> Result<Link, CalibrateError> {
        let point = request.point();
        let curve = |what: &'static str, most: u64, start: &dyn Fn(u64) -> Result<Ticket, GpuError>| {
            let points = grid(4096.0, 4.0, self.room().min(most) as f64)
                .iter()
                .map(|bytes| Ok((*bytes, steady(point, |n| self.run(n, || start(*bytes as u64)))?)))
                .collect::<Result<Vec<_>, GpuError>>()?;
            Curve::rising(points).map_err(|cause| CalibrateError::Curve { what, cause })
        };
        let mut to_device = Vec::new();
        for (source, arena) in &self.arenas {
            let seconds = curve("copies to the device", arena.size(), &|bytes| self.start(arena, bytes))?;
            to_device.push(PageCurve { source: *source, seconds });
        }
        let to_host = curve("copies to the host", self.room(), &|bytes| self.start_back(bytes))?;
        let small_seconds = steady(point, |n| (0..n).try_for_each(|_| self.run(1, || self.start_back(4096))))?;
        let (to_device_beside_to_host, to_host_beside_to_device) =
            self.both_ways(to_device[0].seconds.clone(), &to_host)?;
        self.page_seconds = to_device[0].seconds.at(self.page_bytes as f64);
        Ok(Link {
            pieces: self.pieces(request)?,
            to_device,
            to_host,
            small_seconds,
            to_device_beside_to_host,
            to_host_beside_to_device,
        })
    }

    /// Copies of many pieces: seconds of each, over its bytes.
    fn pieces(&self, request: &Request<'_>) -> Result<Curve, CalibrateError> {
        let arena = &self.arenas[0].1;
        let mut points = Vec::new();
        for bytes in grid(4096.0, 4.0, (1u64 << 20).min(self.room()) as f64) {
            let bytes = bytes as u64;
            let many = (self.room() / bytes).min(1024);
            // Every other place of the host's memory, so that neighbours are not joined into one piece.
            let stride = if arena.size() >= 2 * many * bytes { 2 * bytes } else { bytes };
            let seconds = steady(request.point(), |n| {
                self.run(n, || {
                    let copy = |i: u64| {
                        let at = i * stride % (arena.size() - bytes + 1) / 4 * 4;
                        CopyRange::new(arena.at(at), self.device.at((many - 1 - i) * bytes), bytes)
                    };
                    self.gpu.copy(Line::ToDevice, &(0..many).map(copy).collect::<Vec<_>>(), &[])
                })
            })?;
            points.push((bytes as f64, seconds / many as f64));
        }
        Curve::rising(points).map_err(|cause| CalibrateError::Curve { what: "copies of many pieces", cause })
    }

    /// Factors by which copies of a page's size slow down, to the device and to the host, while others go the other way.
    fn both_ways(&self, to_device: Curve, to_host: &Curve) -> Result<(f64, f64), GpuError> {
        let bytes = self.page_bytes;
        let alone = [to_device.at(bytes as f64), to_host.at(bytes as f64)];
        // Both sides are busy for as long as the shorter one takes; so many that neither ends early.
        let n = ((0.05 / alone[0].max(alone[1])) as usize).clamp(2, 64);
        let begun = Instant::now();
        let mut tickets = [None, None];
        for _ in 0..n {
            tickets = [Some(self.start(&self.arenas[0].1, bytes)?), Some(self.start_back(bytes)?)];
        }
        let mut factors = [1.0f64; 2];
        for ((ticket, alone), factor) in tickets.into_iter().flatten().zip(alone).zip(&mut factors) {
            self.gpu.wait_for(ticket)?;
            *factor = (begun.elapsed().as_secs_f64() / (n as f64 * alone)).max(1.0);
        }
        Ok((factors[0], factors[1]))
    }

    /// Runs `work` while pages come without a pause; returns its result and the seconds that a page took meanwhile, none where
    /// it ended before any page did.
    pub fn beside<T>(
        &self,
        work: impl FnOnce() -> Result<T, CalibrateError>,
    ) -> Result<(T, Option<f64>), CalibrateError> {
        let stop = AtomicBool::new(false);
        let (started, pages) = (AtomicBool::new(false), AtomicU64::new(0));
        let arena = &self.arenas[0].1;
        std::thread::scope(|scope| {
            let copier = scope.spawn(|| -> Result<(), GpuError> {
                // As far ahead as in a run, so that the link never waits for a thread that has to wait for a core.
                let mut under_way = VecDeque::new();
                while !stop.load(Relaxed) {
                    under_way.push_back(self.start(arena, self.page_bytes)?);
                    started.store(true, Relaxed);
                    if under_way.len() > PAGES_AHEAD {
                        self.gpu.wait_for(under_way.pop_front().expect("it is not empty"))?;
                        pages.fetch_add(1, Relaxed);
                    }
                }
                under_way.into_iter().try_for_each(|page| self.gpu.wait_for(page))
            });
            while !started.load(Relaxed) && !copier.is_finished() {
                std::thread::yield_now();
            }
            let (begun, first) = (Instant::now(), pages.load(Relaxed));
            let result = work();
            let (seconds, n) = (begun.elapsed().as_secs_f64(), pages.load(Relaxed) - first);
            stop.store(true, Relaxed);
            copier.join().expect("the copying thread does not panic")?;
            Ok((result?, (n > 0).then(|| seconds / n as f64)))
        })
    }

    /// Bytes of a page that other work is measured beside.
    pub fn page_bytes(&self) -> f64 {
        self.page_bytes as f64
    }

    /// Seconds of such a page, back to back with others, as it was measured by size: a link that has just been idle is slower at first.
    pub fn page_seconds(&self) -> f64 {
        self.page_seconds
    }
}
