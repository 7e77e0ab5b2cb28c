//! When submissions ran: the device's clock, read at the start and the end of each, tied to the host's.
//!
//! In: submissions as they are recorded. Out: for each ticket when it began and ended, in the host's time.
//!
//! Guarantees: of two submissions of the compute queue the later one neither begins nor ends earlier, whatever the ticks say. Given up: by how
//! much a driver's ticks are off is not known, nor mended otherwise.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::device::{Gpu, GpuError};
use super::transfer::{Line, Ticket};

/// Queries of one set, two for each submission.
const SET_QUERIES: u32 = wgpu::QUERY_SET_MAX_QUERIES;

pub(super) struct Clock {
    state: Mutex<State>,
    nanoseconds_per_tick: f64,
}

struct State {
    sets: Vec<wgpu::QuerySet>,
    /// Submissions begun since the last [`Clock::take_spans`].
    begun: u32,
    submitted: Vec<(Ticket, u32)>,
    /// A tick and the moment it stands for, where no calibrated clock says.
    tie: Option<(u64, Instant)>,
}

impl Clock {
    pub fn new(queue: &wgpu::Queue) -> Self {
        let state = State { sets: Vec::new(), begun: 0, submitted: Vec::new(), tie: None };
        Self { state: Mutex::new(state), nanoseconds_per_tick: queue.get_timestamp_period() as f64 }
    }

    /// Reads the clock at this point of `encoder`; returns the submission's number.
    pub fn start(&self, device: &wgpu::Device, encoder: &mut wgpu::CommandEncoder) -> u32 {
        let mut state = self.state.lock().expect("clock lock");
        let number = state.begun;
        state.begun += 1;
        let (set, query) = place(number);
        if set == state.sets.len() {
            state.sets.push(device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count: SET_QUERIES,
            }));
        }
        encoder.write_timestamp(&state.sets[set], query);
        number
    }

    pub fn end(&self, encoder: &mut wgpu::CommandEncoder, number: u32) {
        let state = self.state.lock().expect("clock lock");
        let (set, query) = place(number);
        encoder.write_timestamp(&state.sets[set], query + 1);
    }

    pub fn submitted(&self, number: u32, ticket: Ticket) {
        self.state.lock().expect("clock lock").submitted.push((ticket, number));
    }

    /// See [`Gpu::take_spans`]. Everything that was timed has run; numbers begin anew afterwards.
    pub fn take_spans(&self, gpu: &Gpu, tickets: &[Ticket]) -> Result<Vec<Option<(Instant, Instant)>>, GpuError> {
        let mut state = self.state.lock().expect("clock lock");
        let ticks = self.read(gpu, &state)?;
        let tie = match gpu.transfer.clock() {
            Some(tie) => Some(tie),
            None => match state.tie {
                Some(tie) => Some(tie),
                None => {
                    state.tie = self.bracket(gpu, &state)?;
                    state.tie
                }
            },
        };
        let submitted = in_order(std::mem::take(&mut state.submitted), &ticks);
        state.begun = 0;
        let Some((tick, moment)) = tie else { return Ok(vec![None; tickets.len()]) };
        let host = |at: u64| {
            let nanoseconds = (at as i128 - tick as i128) as f64 * self.nanoseconds_per_tick;
            let distance = Duration::from_nanos(nanoseconds.abs() as u64);
            if nanoseconds >= 0.0 { moment + distance } else { moment.checked_sub(distance).unwrap_or(moment) }
        };
        Ok(tickets
            .iter()
            .map(|ticket| {
                let (start, end) = match ticket.line {
                    Line::Compute => *submitted.get(ticket)?,
                    Line::ToDevice | Line::ToHost => gpu.transfer.take_ticks(*ticket)?,
                };
                Some((host(start), host(end.max(start))))
            })
            .collect())
    }

    /// All queries written since the last time.
    fn read(&self, gpu: &Gpu, state: &State) -> Result<Vec<u64>, GpuError> {
        let queries = 2 * state.begun;
        if queries == 0 {
            return Ok(Vec::new());
        }
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("resolved timestamps"),
            size: 8 * queries as u64,
            usage,
            mapped_at_creation: false,
        });
        let read = gpu.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("read timestamps"),
            size: 8 * queries as u64,
            usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        for (set, first) in state.sets.iter().zip((0..queries).step_by(SET_QUERIES as usize)) {
            let n = (queries - first).min(SET_QUERIES);
            encoder.resolve_query_set(set, 0..n, &resolved, 8 * first as u64);
        }
        encoder.copy_buffer_to_buffer(&resolved, 0, &read, 0, 8 * queries as u64);
        let mut commands = Some(encoder.finish());
        gpu.transfer.exclusively(&mut || {
            gpu.queue.submit(commands.take());
        });
        read.slice(..).map_async(wgpu::MapMode::Read, |_| {});
        gpu.wait()?;
        let view = read.slice(..).get_mapped_range().map_err(|error| GpuError::Lost(error.to_string()))?;
        Ok(bytemuck::pod_collect_to_vec(&view))
    }

    /// Without a calibrated clock: an empty submission's time, taken as the middle of its round trip.
    fn bracket(&self, gpu: &Gpu, state: &State) -> Result<Option<(u64, Instant)>, GpuError> {
        let Some(set) = state.sets.first() else { return Ok(None) };
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        encoder.write_timestamp(set, 0);
        let mut commands = Some(encoder.finish());
        gpu.wait()?;
        let before = Instant::now();
        gpu.transfer.exclusively(&mut || {
            gpu.queue.submit(commands.take());
        });
        gpu.wait()?;
        let moment = before + before.elapsed() / 2;
        let one = State { sets: vec![set.clone()], begun: 1, submitted: Vec::new(), tie: None };
        Ok(self.read(gpu, &one)?.first().map(|tick| (*tick, moment)))
    }
}

/// Start and end of each submission. A queue begins and ends its submissions in turn, but where a thread of the driver reads the clock beside
/// those that compute (llvmpipe), its ticks can tell another order: what came later is taken to be no earlier.
fn in_order(mut submitted: Vec<(Ticket, u32)>, ticks: &[u64]) -> HashMap<Ticket, (u64, u64)> {
    submitted.sort_unstable_by_key(|(ticket, _)| ticket.value);
    let (mut start, mut end) = (0, 0);
    submitted
        .into_iter()
        .filter_map(|(ticket, number)| {
            let number = number as usize;
            start = start.max(*ticks.get(2 * number)?);
            end = end.max(*ticks.get(2 * number + 1)?);
            Some((ticket, (start, end)))
        })
        .collect()
}

/// Which set, and which query of it, a submission's start is.
fn place(number: u32) -> (usize, u32) {
    let pairs = SET_QUERIES / 2;
    ((number / pairs) as usize, number % pairs * 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_submissions_neither_begin_nor_end_earlier() {
        let ticket = |value| Ticket { line: Line::Compute, value };
        // Recorded in another order than submitted; the second's clock was read early, the third's never.
        let spans = in_order(vec![(ticket(8), 0), (ticket(7), 1), (ticket(9), 2)], &[30, 38, 31, 40, 50]);
        assert_eq!(spans, HashMap::from([(ticket(7), (31, 40)), (ticket(8), (31, 40))]));
    }
}
