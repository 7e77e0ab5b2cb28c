//! Dispatches and copies in order, submitted together.

use super::buffer::{Buffer, HostBuffer, Slice};
use super::device::GpuError;
use super::pipeline::{Kernel, Pipelines, Variant};
use super::transfer::Ticket;

/// One submission in the making. Its commands run in the order in which they were recorded; one that sees what an earlier
/// one wrote waits for it.
pub struct Recorder<'p> {
    pipelines: &'p Pipelines,
    encoder: wgpu::CommandEncoder,
    pass: Option<wgpu::ComputePass<'static>>,
    /// Host memory that kernels or copies write: made visible to the host at the end.
    host_written: Vec<wgpu::Buffer>,
    /// Number of this submission in the clock's queries.
    timed: Option<u32>,
}

impl<'p> Recorder<'p> {
    pub fn new(pipelines: &'p Pipelines) -> Self {
        let encoder = pipelines.gpu().device.create_command_encoder(&Default::default());
        Self { pipelines, encoder, pass: None, host_written: Vec::new(), timed: None }
    }

    /// One whose start and end the device's clock is read at, where it has one.
    pub fn timed(pipelines: &'p Pipelines) -> Self {
        let mut recorder = Self::new(pipelines);
        if let Some(clock) = &pipelines.gpu().clock {
            recorder.timed = Some(clock.start(&pipelines.gpu().device, &mut recorder.encoder));
        }
        recorder
    }

    /// Most workgroups in one dimension of a dispatch.
    pub fn max_workgroups(&self) -> u32 {
        self.pipelines.gpu().max_workgroups()
    }

    /// Runs `workgroups` of a kernel variant over `bindings` (binding 0, 1, …) with `params`. Nothing happens where a count
    /// of workgroups is 0.
    pub fn dispatch<P: bytemuck::NoUninit>(
        &mut self,
        kernel: &'static Kernel,
        variant: &Variant,
        params: &P,
        bindings: &[Slice<'_>],
        workgroups: [u32; 3],
    ) -> Result<(), GpuError> {
        if workgroups.contains(&0) {
            return Ok(());
        }
        let gpu = self.pipelines.gpu();
        let most = gpu.max_workgroups();
        assert!(workgroups.iter().all(|n| *n <= most), "{}: {workgroups:?} workgroups, at most {most}", kernel.name);
        let pipeline = self.pipelines.get(kernel, variant)?;
        assert_eq!(pipeline.n_bindings, bindings.len(), "{}: number of bindings", pipeline.kernel);
        assert_eq!(pipeline.param_bytes, size_of::<P>(), "{}: size of the parameters", pipeline.kernel);
        let entries: Vec<_> = bindings
            .iter()
            .enumerate()
            .map(|(binding, slice)| wgpu::BindGroupEntry {
                binding: binding as u32,
                resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer: slice.raw,
                    offset: slice.offset,
                    size: wgpu::BufferSize::new(slice.size.next_multiple_of(4)),
                }),
            })
            .collect();
        let group = gpu.device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: Some(pipeline.kernel),
            layout: &pipeline.layout,
            entries: &entries,
        });
        for slice in bindings.iter().filter(|slice| slice.host) {
            self.host_written.push(slice.raw.clone());
        }
        let pass =
            self.pass.get_or_insert_with(|| self.encoder.begin_compute_pass(&Default::default()).forget_lifetime());
        pass.set_pipeline(&pipeline.raw);
        pass.set_bind_group(0, &group, &[]);
        if pipeline.param_bytes > 0 {
            pass.set_immediates(0, bytemuck::bytes_of(params));
        }
        let [x, y, z] = workgroups;
        pass.dispatch_workgroups(x, y, z);
        Ok(())
    }

    /// A few bytes to `buffer` at `offset`; offset and length are multiples of 4.
    pub fn upload(&mut self, buffer: &Buffer, offset: u64, bytes: &[u8]) -> Result<(), GpuError> {
        if bytes.is_empty() {
            return Ok(());
        }
        drop(self.pass.take());
        let gpu = self.pipelines.gpu();
        let mut uploads = gpu.uploads.lock().expect("uploads lock");
        uploads.record(gpu, &mut self.encoder, buffer, offset, bytes)
    }

    /// `from` to bytes `at ..` of host memory, where they can be read when this submission has been waited for.
    pub fn download(&mut self, from: Slice<'_>, to: &HostBuffer, at: u64) {
        if from.size == 0 {
            return;
        }
        drop(self.pass.take());
        self.pipelines.gpu().transfer.download(&mut self.encoder, from, to, at);
        self.host_written.extend(to.view.clone());
    }

    /// Sends everything recorded to the device. Returns before it has run; [`Gpu::wait`](super::Gpu::wait) waits.
    pub fn submit(self) -> Result<(), GpuError> {
        self.submit_after(&[]).map(|_| ())
    }

    /// Sends everything recorded to the device, to run when `after` has been reached.
    pub fn submit_after(mut self, after: &[Ticket]) -> Result<Ticket, GpuError> {
        drop(self.pass.take());
        let gpu = self.pipelines.gpu();
        if !self.host_written.is_empty() {
            let state = wgpu::BufferUses::MAP_READ;
            let transitions = self.host_written.iter().map(|buffer| wgpu::BufferTransition { buffer, state });
            self.encoder.transition_resources(transitions, std::iter::empty());
        }
        if let (Some(clock), Some(number)) = (&gpu.clock, self.timed) {
            clock.end(&mut self.encoder, number);
        }
        let ticket = gpu.transfer.submit(self.encoder.finish(), after)?;
        if let (Some(clock), Some(number)) = (&gpu.clock, self.timed) {
            clock.submitted(number, ticket);
        }
        Ok(ticket)
    }
}
