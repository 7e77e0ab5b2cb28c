//! The adapter that was chosen, opened, and watched for faults.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};

use super::buffer::Buffer;

/// What the GPU side can fail with.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GpuError {
    #[error(
        "no Vulkan adapter answers; install a driver (on Debian: apt-get install mesa-vulkan-drivers libvulkan1 \
         for the software one, lavapipe)"
    )]
    NoAdapter,
    #[error("no adapter matches '{wanted}'; there are: {found}")]
    NoSuchAdapter { wanted: String, found: String },
    #[error("adapter {adapter} lacks {feature}, which every kernel needs")]
    MissingFeature { adapter: String, feature: &'static str },
    #[error("adapter {adapter} would not open: {cause}")]
    Open { adapter: String, cause: String },
    #[error("out of device memory: {what} needs {needed} bytes beside the {taken} bytes already taken ({cause})")]
    OutOfMemory { what: String, needed: u64, taken: u64, cause: String },
    #[error("{what} needs {needed} bytes in one binding, the adapter allows {limit}")]
    BindingTooLarge { what: String, needed: u64, limit: u64 },
    #[error("shader {kernel}: {cause}")]
    Shader { kernel: String, cause: String },
    #[error("the device was lost: {0}")]
    Lost(String),
}

/// One line of `fulmen devices`.
#[derive(Debug, Clone, serde::Serialize)]
pub struct AdapterSummary {
    pub index: usize,
    pub name: String,
    /// discrete, integrated, virtual, cpu or other
    pub kind: String,
    pub backend: String,
    pub driver: String,
    /// Largest storage binding in bytes.
    pub max_binding_bytes: u64,
    pub max_buffer_bytes: u64,
    pub workgroup_memory_bytes: u32,
    pub subgroup_sizes: (u32, u32),
    /// Has what every kernel needs.
    pub usable: bool,
}

/// Which adapter to open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DeviceChoice {
    /// The best kind there is: discrete before integrated before virtual before CPU.
    #[default]
    Best,
    /// By its number in `fulmen devices`.
    Index(usize),
    /// By a part of its name, case ignored.
    Name(String),
}

impl From<&str> for DeviceChoice {
    fn from(text: &str) -> Self {
        match text.parse() {
            Ok(index) => DeviceChoice::Index(index),
            Err(_) => DeviceChoice::Name(text.to_owned()),
        }
    }
}

/// An open device with its queue.
pub struct Gpu {
    pub(super) device: wgpu::Device,
    pub(super) queue: wgpu::Queue,
    summary: AdapterSummary,
    limits: wgpu::Limits,
    /// First fault that wgpu reported outside of a call: a lost device or an uncaptured error.
    fault: Arc<Mutex<Option<String>>>,
    taken: Arc<AtomicU64>,
}

/// Immediates hold a kernel's parameters: 128 bytes is what every Vulkan driver has.
const MAX_PARAM_BYTES: u32 = 128;

fn backends() -> wgpu::Backends {
    let mut backends = wgpu::Backends::VULKAN;
    if cfg!(feature = "metal") {
        backends |= wgpu::Backends::METAL;
    }
    if cfg!(feature = "dx12") {
        backends |= wgpu::Backends::DX12;
    }
    backends
}

fn adapters() -> Vec<wgpu::Adapter> {
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: backends(),
        // No validation of indirect calls, no debug layer: `make test-validation` asks for layers by environment.
        flags: wgpu::InstanceFlags::empty(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    pollster::block_on(instance.enumerate_adapters(backends()))
}

fn summarise(index: usize, adapter: &wgpu::Adapter) -> AdapterSummary {
    let (info, limits) = (adapter.get_info(), adapter.limits());
    AdapterSummary {
        index,
        name: info.name,
        kind: match info.device_type {
            wgpu::DeviceType::DiscreteGpu => "discrete",
            wgpu::DeviceType::IntegratedGpu => "integrated",
            wgpu::DeviceType::VirtualGpu => "virtual",
            wgpu::DeviceType::Cpu => "cpu",
            wgpu::DeviceType::Other => "other",
        }
        .to_owned(),
        backend: format!("{:?}", info.backend).to_lowercase(),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        max_binding_bytes: limits.max_storage_buffer_binding_size,
        max_buffer_bytes: limits.max_buffer_size,
        workgroup_memory_bytes: limits.max_compute_workgroup_storage_size,
        subgroup_sizes: (info.subgroup_min_size, info.subgroup_max_size),
        usable: adapter.features().contains(wgpu::Features::IMMEDIATES),
    }
}

/// Every adapter that answers, in the order that `--device N` counts.
pub fn list_adapters() -> Vec<AdapterSummary> {
    adapters().iter().enumerate().map(|(index, adapter)| summarise(index, adapter)).collect()
}

impl Gpu {
    pub fn open(choice: &DeviceChoice) -> Result<Gpu, GpuError> {
        let adapters = adapters();
        let summaries: Vec<_> = adapters.iter().enumerate().map(|(i, a)| summarise(i, a)).collect();
        if adapters.is_empty() {
            return Err(GpuError::NoAdapter);
        }
        let rank = |kind: &str| ["discrete", "integrated", "virtual", "other", "cpu"].iter().position(|k| *k == kind);
        let chosen = match choice {
            DeviceChoice::Best => summaries.iter().min_by_key(|s| (!s.usable, rank(&s.kind), s.index)),
            DeviceChoice::Index(index) => summaries.get(*index),
            DeviceChoice::Name(name) => summaries.iter().find(|s| s.name.to_lowercase().contains(&name.to_lowercase())),
        };
        let Some(summary) = chosen.cloned() else {
            let wanted = match choice {
                DeviceChoice::Index(index) => index.to_string(),
                DeviceChoice::Name(name) => name.clone(),
                DeviceChoice::Best => unreachable!("the best of at least one adapter exists"),
            };
            let found = summaries.iter().map(|s| format!("{}: {}", s.index, s.name)).collect::<Vec<_>>().join(", ");
            return Err(GpuError::NoSuchAdapter { wanted, found });
        };
        let adapter = &adapters[summary.index];
        if !summary.usable {
            return Err(GpuError::MissingFeature { adapter: summary.name, feature: "immediates (push constants)" });
        }
        let limits = wgpu::Limits { max_immediate_size: MAX_PARAM_BYTES, ..adapter.limits() };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("fulmen"),
            required_features: wgpu::Features::IMMEDIATES,
            required_limits: limits.clone(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        };
        let (device, queue) = pollster::block_on(adapter.request_device(&descriptor))
            .map_err(|e| GpuError::Open { adapter: summary.name.clone(), cause: e.to_string() })?;

        // wgpu's default handlers panic. Keep the first fault; every wait looks at it.
        let fault = Arc::new(Mutex::new(None::<String>));
        let on_lost = fault.clone();
        device.set_device_lost_callback(move |reason, message| {
            on_lost.lock().expect("fault lock").get_or_insert(format!("{reason:?}: {message}"));
        });
        let on_error = fault.clone();
        device.on_uncaptured_error(Arc::new(move |error| {
            on_error.lock().expect("fault lock").get_or_insert(error.to_string());
        }));
        Ok(Gpu { device, queue, summary, limits, fault, taken: Arc::new(AtomicU64::new(0)) })
    }

    pub fn summary(&self) -> &AdapterSummary {
        &self.summary
    }

    /// Largest storage binding in bytes.
    pub fn max_binding_bytes(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size
    }

    /// Bytes of workgroup memory that one workgroup may use.
    pub fn workgroup_memory_bytes(&self) -> u32 {
        self.limits.max_compute_workgroup_storage_size
    }

    /// Most workgroups in one dimension of a dispatch; 65,535 on most drivers.
    pub fn max_workgroups(&self) -> u32 {
        self.limits.max_compute_workgroups_per_dimension
    }

    /// Alignment of a [`Slice`](super::Slice)'s offset, in bytes.
    pub fn binding_alignment(&self) -> u64 {
        self.limits.min_storage_buffer_offset_alignment as u64
    }

    /// Size of the largest memory heap on the device; None where the backend does not say.
    pub fn memory_bytes(&self) -> Option<u64> {
        // SAFETY: the handles are only asked for properties, and live as long as the device that the guard holds.
        let heaps = unsafe {
            let device = self.device.as_hal::<wgpu::hal::api::Vulkan>()?;
            let instance = device.shared_instance().raw_instance();
            instance.get_physical_device_memory_properties(device.raw_physical_device())
        };
        let local = |heap: &&ash::vk::MemoryHeap| heap.flags.contains(ash::vk::MemoryHeapFlags::DEVICE_LOCAL);
        heaps.memory_heaps_as_slice().iter().filter(local).map(|heap| heap.size).max()
    }

    /// Bytes of device memory in live buffers.
    pub fn taken_bytes(&self) -> u64 {
        self.taken.load(Relaxed)
    }

    /// A storage buffer of `bytes` (rounded up to 4, at least 4), contents zero. It can be copied from and to.
    pub fn buffer(&self, what: &str, bytes: u64) -> Result<Buffer, GpuError> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        self.allocate(what, bytes, usage)
    }

    /// A storage buffer holding `contents`, padded with zeros to a multiple of 4 bytes.
    pub fn buffer_with(&self, what: &str, contents: &[u8]) -> Result<Buffer, GpuError> {
        let buffer = self.buffer(what, contents.len() as u64)?;
        self.write(&buffer, 0, contents);
        Ok(buffer)
    }

    fn allocate(&self, what: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<Buffer, GpuError> {
        let size = bytes.next_multiple_of(4).max(4);
        if usage.contains(wgpu::BufferUsages::STORAGE) && size > self.max_binding_bytes() {
            return Err(GpuError::BindingTooLarge {
                what: what.to_owned(),
                needed: size,
                limit: self.max_binding_bytes(),
            });
        }
        let out_of_memory = self.device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
        let invalid = self.device.push_error_scope(wgpu::ErrorFilter::Validation);
        let raw = self.device.create_buffer(&wgpu::BufferDescriptor {
            label: Some(what),
            size,
            usage,
            mapped_at_creation: false,
        });
        let cause = pollster::block_on(invalid.pop()).or(pollster::block_on(out_of_memory.pop()));
        if let Some(cause) = cause {
            return Err(GpuError::OutOfMemory {
                what: what.to_owned(),
                needed: size,
                taken: self.taken_bytes(),
                cause: cause.to_string(),
            });
        }
        self.taken.fetch_add(size, Relaxed);
        Ok(Buffer::new(raw, size, self.taken.clone()))
    }

    /// Copies `bytes` to `buffer` at `offset` (a multiple of 4), before any work submitted later. The last 1-3 bytes of
    /// a length that is no multiple of 4 are padded with zeros.
    pub fn write(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) {
        let whole = bytes.len() / 4 * 4;
        if whole > 0 {
            self.queue.write_buffer(&buffer.raw, offset, &bytes[..whole]);
        }
        if whole < bytes.len() {
            let mut last = [0u8; 4];
            last[..bytes.len() - whole].copy_from_slice(&bytes[whole..]);
            self.queue.write_buffer(&buffer.raw, offset + whole as u64, &last);
        }
    }

    /// Waits for all submitted work, then returns the bytes of `slice`.
    pub fn read(&self, slice: super::Slice<'_>) -> Result<Vec<u8>, GpuError> {
        Ok(self.read_many(&[slice])?.pop().expect("one slice in, one out"))
    }

    /// Waits for all submitted work, then returns the bytes of every slice, through one staging buffer.
    pub fn read_many(&self, slices: &[super::Slice<'_>]) -> Result<Vec<Vec<u8>>, GpuError> {
        let total: u64 = slices.iter().map(|s| s.size.next_multiple_of(4)).sum();
        if total == 0 {
            return Ok(slices.iter().map(|_| Vec::new()).collect());
        }
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let staging = self.allocate("read-back staging", total, usage)?;
        let mut encoder = self.device.create_command_encoder(&Default::default());
        let mut at = 0;
        for slice in slices {
            let size = slice.size.next_multiple_of(4);
            if size > 0 {
                encoder.copy_buffer_to_buffer(&slice.buffer.raw, slice.offset, &staging.raw, at, size);
            }
            at += size;
        }
        self.queue.submit([encoder.finish()]);
        staging.raw.slice(..).map_async(wgpu::MapMode::Read, |_| {});
        self.wait()?;
        let view = staging.raw.slice(..).get_mapped_range().map_err(|e| GpuError::Lost(e.to_string()))?;
        let mut at = 0;
        let out = slices
            .iter()
            .map(|slice| {
                let bytes = view[at as usize..(at + slice.size) as usize].to_vec();
                at += slice.size.next_multiple_of(4);
                bytes
            })
            .collect();
        Ok(out)
    }

    /// Starts the copies of all [`write`](Self::write)s so far and frees the staging memory of those that have ended.
    pub fn flush(&self) -> Result<(), GpuError> {
        self.queue.submit([]);
        // Device::poll panics when the driver reports a lost device (wgpu 30, backend/wgpu_core.rs).
        let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(wgpu::PollType::Poll)));
        self.check()?;
        polled.map(|_| ()).map_err(|_| GpuError::Lost("the driver reported a lost device while copying".to_owned()))
    }

    /// Waits until everything submitted has run.
    pub fn wait(&self) -> Result<(), GpuError> {
        // Device::poll panics when the driver reports a lost device (wgpu 30, backend/wgpu_core.rs).
        let polled = catch_unwind(AssertUnwindSafe(|| self.device.poll(wgpu::PollType::wait_indefinitely())));
        self.check()?;
        match polled {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(GpuError::Lost(error.to_string())),
            Err(_) => Err(GpuError::Lost("the driver reported a lost device while waiting".to_owned())),
        }
    }

    /// The first fault reported outside of a call, if there was one.
    pub fn check(&self) -> Result<(), GpuError> {
        match self.fault.lock().expect("fault lock").as_ref() {
            Some(fault) => Err(GpuError::Lost(fault.clone())),
            None => Ok(()),
        }
    }
}
