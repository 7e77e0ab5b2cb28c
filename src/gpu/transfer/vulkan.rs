//! Transfer queues beside wgpu's own: raw Vulkan on the device that wgpu opened.
//!
//! The device is opened with queues of a transfer-only family where there is one (two: one for each direction), else with a
//! second queue of wgpu's family, else copies share wgpu's queue under its lock. Buffers that copies reach are raw,
//! CONCURRENT over both families, and wrapped once for wgpu, which only ever binds them; so it tracks no layout and inserts
//! no barrier for them, and semaphores alone order the two sides.

use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ash::vk;
use wgpu::hal::api::Vulkan;

use super::{HostMemoryRefused, Line, SharedBuffer, Ticket, Ticks, Transfer};
use crate::gpu::buffer::{CopyRange, HostBuffer, HostMemory, Keep, Slice};
use crate::gpu::device::Faults;
use crate::gpu::{GpuError, TestFaults, workgroup_matrices};

/// Copies that may be under way at a time on one line. A copy beyond that waits for the oldest.
const DEPTH: usize = 256;
/// Waiting looks for a fault this often.
const GLANCE: Duration = Duration::from_millis(500);

/// The Vulkan device under wgpu's, which it keeps alive.
pub(super) struct Raw {
    device: ash::Device,
    memory: vk::PhysicalDeviceMemoryProperties,
    /// Queue families that use shared buffers.
    families: Vec<u32>,
    host_import: Option<ash::ext::external_memory_host::Device>,
    /// Alignment of imported memory.
    import_alignment: u64,
    calibrated: Option<ash::ext::calibrated_timestamps::Device>,
    faults: TestFaults,
    _keep: wgpu::Device,
}

/// A VkBuffer with memory of its own.
struct RawBuffer {
    raw: Arc<Raw>,
    buffer: vk::Buffer,
    memory: vk::DeviceMemory,
    /// Of imported memory.
    _imported: Option<Keep>,
}

impl Drop for RawBuffer {
    fn drop(&mut self) {
        // SAFETY: whoever submits work with this buffer keeps it until that has run, and the device outlives `raw`.
        unsafe {
            self.raw.device.destroy_buffer(self.buffer, None);
            self.raw.device.free_memory(self.memory, None);
        }
    }
}

/// Where memory should lie: (wanted, avoided) properties, the best first.
type Preference = [(vk::MemoryPropertyFlags, vk::MemoryPropertyFlags)];

fn device_preference() -> [(vk::MemoryPropertyFlags, vk::MemoryPropertyFlags); 2] {
    use vk::MemoryPropertyFlags as P;
    [(P::DEVICE_LOCAL, P::HOST_VISIBLE), (P::DEVICE_LOCAL, P::empty())]
}

/// Host memory must not land in the part of the device's memory that the host can see: it would be slow, and scarce.
fn host_preference() -> [(vk::MemoryPropertyFlags, vk::MemoryPropertyFlags); 3] {
    use vk::MemoryPropertyFlags as P;
    let coherent = P::HOST_VISIBLE | P::HOST_COHERENT;
    [(coherent | P::HOST_CACHED, P::DEVICE_LOCAL), (coherent, P::DEVICE_LOCAL), (coherent, P::empty())]
}

impl Raw {
    fn buffer(&self, bytes: u64, imported: bool) -> Result<vk::Buffer, vk::Result> {
        use vk::BufferUsageFlags as U;
        let mut external = vk::ExternalMemoryBufferCreateInfo::default()
            .handle_types(vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT);
        let mut info =
            vk::BufferCreateInfo::default().size(bytes).usage(U::TRANSFER_SRC | U::TRANSFER_DST | U::STORAGE_BUFFER);
        if self.families.len() > 1 {
            info = info.sharing_mode(vk::SharingMode::CONCURRENT).queue_family_indices(&self.families);
        }
        if imported {
            info = info.push_next(&mut external);
        }
        // SAFETY: the structures live until the call returns.
        unsafe { self.device.create_buffer(&info, None) }
    }

    /// Memory types of `bits`, best first by `preference`.
    fn types(&self, bits: u32, preference: &Preference) -> Vec<u32> {
        let types = self.memory.memory_types_as_slice();
        let mut found = Vec::new();
        for (wanted, avoided) in preference {
            for (index, kind) in types.iter().enumerate() {
                let fits = bits & (1 << index) != 0
                    && kind.property_flags.contains(*wanted)
                    && !kind.property_flags.intersects(*avoided);
                if fits && !found.contains(&(index as u32)) {
                    found.push(index as u32);
                }
            }
        }
        found
    }

    fn allocate(self: &Arc<Self>, bytes: u64, preference: &Preference) -> Result<RawBuffer, vk::Result> {
        let buffer = self.buffer(bytes, false)?;
        // SAFETY: handles of this device, structures that live until the calls return; what fails is destroyed.
        unsafe {
            let needs = self.device.get_buffer_memory_requirements(buffer);
            let mut error = vk::Result::ERROR_OUT_OF_DEVICE_MEMORY;
            for kind in self.types(needs.memory_type_bits, preference) {
                let mut dedicated = vk::MemoryDedicatedAllocateInfo::default().buffer(buffer);
                let info = vk::MemoryAllocateInfo::default()
                    .allocation_size(needs.size)
                    .memory_type_index(kind)
                    .push_next(&mut dedicated);
                match self.device.allocate_memory(&info, None) {
                    Ok(memory) => {
                        let made = RawBuffer { raw: self.clone(), buffer, memory, _imported: None };
                        return self.device.bind_buffer_memory(buffer, memory, 0).map(|()| made);
                    }
                    Err(refused) => error = refused,
                }
            }
            self.device.destroy_buffer(buffer, None);
            Err(error)
        }
    }

    fn import(self: &Arc<Self>, pointer: *mut u8, bytes: u64, keep: Keep) -> Result<RawBuffer, String> {
        let host_import = self.host_import.as_ref().ok_or("the driver has no VK_EXT_external_memory_host")?;
        let alignment = self.import_alignment;
        if !(pointer as u64).is_multiple_of(alignment) || !bytes.is_multiple_of(alignment) {
            return Err(format!("address and size must be multiples of {alignment}"));
        }
        let handle_type = vk::ExternalMemoryHandleTypeFlags::HOST_ALLOCATION_EXT;
        let mut properties = vk::MemoryHostPointerPropertiesEXT::default();
        let named = |call: &'static str| move |error: vk::Result| format!("{call}: {error}");
        // SAFETY: the memory is there for as long as `keep`, which the buffer holds; structures live until the calls return.
        unsafe {
            let ask = host_import.fp().get_memory_host_pointer_properties_ext;
            ask(self.device.handle(), handle_type, pointer.cast(), &mut properties)
                .result()
                .map_err(named("vkGetMemoryHostPointerPropertiesEXT"))?;
            let buffer = self.buffer(bytes, true).map_err(named("vkCreateBuffer"))?;
            let needs = self.device.get_buffer_memory_requirements(buffer);
            let any = [(vk::MemoryPropertyFlags::empty(), vk::MemoryPropertyFlags::empty())];
            let preference: Vec<_> = host_preference().into_iter().chain(any).collect();
            let kinds = self.types(needs.memory_type_bits & properties.memory_type_bits, &preference);
            let mut error = "no memory type takes it".to_owned();
            for kind in kinds {
                let mut import =
                    vk::ImportMemoryHostPointerInfoEXT::default().handle_type(handle_type).host_pointer(pointer.cast());
                let info = vk::MemoryAllocateInfo::default()
                    .allocation_size(bytes)
                    .memory_type_index(kind)
                    .push_next(&mut import);
                match self.device.allocate_memory(&info, None) {
                    Ok(memory) => {
                        let made = RawBuffer { raw: self.clone(), buffer, memory, _imported: Some(keep) };
                        self.device.bind_buffer_memory(buffer, memory, 0).map_err(named("vkBindBufferMemory"))?;
                        return Ok(made);
                    }
                    Err(refused) => error = format!("vkAllocateMemory: {refused}"),
                }
            }
            self.device.destroy_buffer(buffer, None);
            Err(error)
        }
    }
}

/// A timeline semaphore and the last value that has been submitted for it.
struct Timeline {
    raw: Arc<Raw>,
    semaphore: vk::Semaphore,
    submitted: AtomicU64,
}

impl Timeline {
    fn new(raw: &Arc<Raw>) -> Result<Self, vk::Result> {
        let mut kind = vk::SemaphoreTypeCreateInfo::default().semaphore_type(vk::SemaphoreType::TIMELINE);
        // SAFETY: the structures live until the call returns.
        let semaphore =
            unsafe { raw.device.create_semaphore(&vk::SemaphoreCreateInfo::default().push_next(&mut kind), None)? };
        Ok(Self { raw: raw.clone(), semaphore, submitted: AtomicU64::new(0) })
    }

    fn wait(&self, value: u64, longest: Duration) -> Result<(), vk::Result> {
        let (semaphores, values) = ([self.semaphore], [value]);
        let info = vk::SemaphoreWaitInfo::default().semaphores(&semaphores).values(&values);
        // SAFETY: a semaphore of this device; the structures live until the call returns.
        unsafe { self.raw.device.wait_semaphores(&info, longest.as_nanos() as u64) }
    }
}

impl Drop for Timeline {
    fn drop(&mut self) {
        // SAFETY: what signals or waits for it has run: `VulkanTransfer::drop` waits.
        unsafe { self.raw.device.destroy_semaphore(self.semaphore, None) }
    }
}

/// One place in a line's ring of command buffers.
struct Place {
    commands: vk::CommandBuffer,
    /// Value of the copy that used it last.
    value: u64,
    /// Memory of that copy.
    keep: Vec<Keep>,
    timed: bool,
}

struct Ring {
    pool: vk::CommandPool,
    /// Two timestamps for each place.
    queries: Option<vk::QueryPool>,
    places: Vec<Place>,
    next: usize,
    ticks: HashMap<u64, Ticks>,
}

/// Copies in one direction.
struct CopyLine {
    queue: vk::Queue,
    /// VkQueue wants one thread at a time; wgpu's own where it is wgpu's queue.
    lock: Arc<Mutex<()>>,
    timeline: Timeline,
    ring: Mutex<Ring>,
}

impl CopyLine {
    fn new(
        raw: &Arc<Raw>,
        family: u32,
        queue: vk::Queue,
        lock: Arc<Mutex<()>>,
        timed: bool,
    ) -> Result<Self, vk::Result> {
        use vk::CommandPoolCreateFlags as F;
        // SAFETY: structures live until the calls return.
        unsafe {
            let info = vk::CommandPoolCreateInfo::default()
                .queue_family_index(family)
                .flags(F::RESET_COMMAND_BUFFER | F::TRANSIENT);
            let pool = raw.device.create_command_pool(&info, None)?;
            let info = vk::CommandBufferAllocateInfo::default().command_pool(pool).command_buffer_count(DEPTH as u32);
            let commands = raw.device.allocate_command_buffers(&info)?;
            let queries = if timed {
                let info = vk::QueryPoolCreateInfo::default()
                    .query_type(vk::QueryType::TIMESTAMP)
                    .query_count(2 * DEPTH as u32);
                Some(raw.device.create_query_pool(&info, None)?)
            } else {
                None
            };
            let place = |commands| Place { commands, value: 0, keep: Vec::new(), timed: false };
            let places = commands.into_iter().map(place).collect();
            let ring = Mutex::new(Ring { pool, queries, places, next: 0, ticks: HashMap::new() });
            Ok(Self { queue, lock, timeline: Timeline::new(raw)?, ring })
        }
    }
}

impl Ring {
    /// The copy at `index` has run: keeps its time, lets go of its memory.
    fn retire(&mut self, raw: &Raw, index: usize) {
        let place = &mut self.places[index];
        place.keep.clear();
        if let (Some(queries), true) = (self.queries, place.timed) {
            place.timed = false;
            let mut ticks = [0u64; 2];
            // SAFETY: the copy that writes these two queries has run.
            let read = unsafe {
                let flags = vk::QueryResultFlags::TYPE_64;
                raw.device.get_query_pool_results(queries, 2 * index as u32, &mut ticks, flags)
            };
            if read.is_ok() {
                self.ticks.insert(place.value, (ticks[0], ticks[1]));
            }
        }
    }
}

pub(in crate::gpu) struct VulkanTransfer {
    device: wgpu::Device,
    queue: wgpu::Queue,
    raw: Arc<Raw>,
    /// Around staged semaphores and the submission that takes them.
    submit: Arc<Mutex<()>>,
    computed: Timeline,
    to_device: CopyLine,
    to_host: CopyLine,
    faults: Arc<Faults>,
    queues: &'static str,
}

/// Queues for copies: family, index within it for each direction, and how that is said.
struct Queues {
    family: u32,
    to_device: u32,
    to_host: u32,
    /// None: wgpu's queue itself.
    own: bool,
    words: &'static str,
}

/// Opens `adapter` with queues for copies, and with VK_NV_cooperative_matrix2 where that is wanted. None: it is no Vulkan adapter.
pub(in crate::gpu) fn open(
    adapter: &wgpu::Adapter,
    (features, limits, with_matrices): (wgpu::Features, &wgpu::Limits, bool),
    faults: Arc<Faults>,
    test_faults: TestFaults,
) -> Option<Result<(wgpu::Device, wgpu::Queue, VulkanTransfer), String>> {
    // SAFETY: the adapter is alive while its guard is.
    let hal = unsafe { adapter.as_hal::<Vulkan>() }?;
    let instance = hal.shared_instance().raw_instance().clone();
    let physical = hal.raw_physical_device();
    let capabilities = hal.physical_device_capabilities();
    let has = |name| capabilities.supports_extension(name);
    let (import, calibrate) = (has(ash::ext::external_memory_host::NAME), has(ash::ext::calibrated_timestamps::NAME));
    // SAFETY: a handle of this instance.
    let (families, mut reset) = unsafe {
        let mut reset = vk::PhysicalDeviceHostQueryResetFeatures::default();
        let mut all = vk::PhysicalDeviceFeatures2::default().push_next(&mut reset);
        instance.get_physical_device_features2(physical, &mut all);
        reset.p_next = std::ptr::null_mut();
        (instance.get_physical_device_queue_family_properties(physical), reset)
    };
    let queues = choose_queues(&families);
    let timed = reset.host_query_reset == vk::TRUE && families[queues.family as usize].timestamp_valid_bits == 64;
    let priorities = [1.0f32; 3];
    let hints = wgpu::MemoryHints::MemoryUsage;
    let reset = &mut reset;
    let mut matrices = workgroup_matrices::Features::needed();
    let mut addresses = vk::PhysicalDeviceBufferDeviceAddressFeatures::default().buffer_device_address(true);
    let (matrices, addresses) = (&mut matrices, &mut addresses);
    // SAFETY: the callback adds queues, extensions and a feature that the device was just found to have.
    let opened = unsafe {
        hal.open_with_callback(
            features,
            limits,
            &hints,
            Some(Box::new(|arguments: wgpu::hal::vulkan::CreateDeviceCallbackArgs<'_, '_, '_>| {
                let info = vk::DeviceQueueCreateInfo::default().queue_family_index(queues.family);
                let count = queues.to_host.max(queues.to_device) as usize + 1;
                if queues.own && queues.family == 0 {
                    arguments.queue_create_infos[0] = info.queue_priorities(&priorities[..count]);
                } else if queues.own {
                    arguments.queue_create_infos.push(info.queue_priorities(&priorities[..count]));
                }
                let mut push = |there: bool, name| {
                    if there && !arguments.extensions.contains(&name) {
                        arguments.extensions.push(name);
                    }
                };
                push(import, ash::ext::external_memory_host::NAME);
                push(calibrate, ash::ext::calibrated_timestamps::NAME);
                if with_matrices {
                    push(true, workgroup_matrices::EXTENSION);
                    // Functions that make f16 of what is loaded are handed references to it.
                    *arguments.create_info =
                        std::mem::take(arguments.create_info).push_next(matrices).push_next(addresses);
                }
                if timed {
                    *arguments.create_info = std::mem::take(arguments.create_info).push_next(reset);
                }
            })),
        )
    };
    drop(hal);
    let open = || -> Result<_, String> {
        let opened = opened.map_err(|error| error.to_string())?;
        // SAFETY: plain questions about a handle of this instance.
        let (memory, import_alignment) = unsafe {
            let mut host = vk::PhysicalDeviceExternalMemoryHostPropertiesEXT::default();
            let mut all = vk::PhysicalDeviceProperties2::default().push_next(&mut host);
            instance.get_physical_device_properties2(physical, &mut all);
            let memory = instance.get_physical_device_memory_properties(physical);
            (memory, host.min_imported_host_pointer_alignment.max(4096))
        };
        let descriptor = wgpu::DeviceDescriptor {
            label: Some("fulmen"),
            required_features: features,
            required_limits: limits.clone(),
            memory_hints: hints.clone(),
            ..Default::default()
        };
        // SAFETY: the device was opened on this adapter with these features and limits.
        let (device, queue) = unsafe { adapter.create_device_from_hal::<Vulkan>(opened, &descriptor) }
            .map_err(|error| error.to_string())?;
        // SAFETY: the guard is held while the handles are copied out, and `Raw` keeps the wgpu device.
        let (raw_device, compute_family, compute_queue) = unsafe {
            let hal = device.as_hal::<Vulkan>().expect("just made from Vulkan");
            (hal.raw_device().clone(), hal.queue_family_index(), hal.raw_queue())
        };
        let mut shared_by = vec![compute_family];
        if queues.family != compute_family {
            shared_by.push(queues.family);
        }
        let raw = Arc::new(Raw {
            host_import: import.then(|| ash::ext::external_memory_host::Device::new(&instance, &raw_device)),
            calibrated: calibrate.then(|| ash::ext::calibrated_timestamps::Device::new(&instance, &raw_device)),
            device: raw_device,
            memory,
            families: shared_by,
            import_alignment,
            faults: test_faults,
            _keep: device.clone(),
        });
        let submit = Arc::new(Mutex::new(()));
        let vulkan = |error: vk::Result| error.to_string();
        let queue_at = |index: u32| {
            // SAFETY: the device was opened with this queue.
            if queues.own { unsafe { raw.device.get_device_queue(queues.family, index) } } else { compute_queue }
        };
        let lock = if queues.own { Arc::new(Mutex::new(())) } else { submit.clone() };
        let other_lock =
            if queues.own && queues.to_host != queues.to_device { Arc::new(Mutex::new(())) } else { lock.clone() };
        let transfer = VulkanTransfer {
            computed: Timeline::new(&raw).map_err(vulkan)?,
            to_device: CopyLine::new(&raw, queues.family, queue_at(queues.to_device), lock, timed).map_err(vulkan)?,
            to_host: CopyLine::new(&raw, queues.family, queue_at(queues.to_host), other_lock, timed).map_err(vulkan)?,
            device: device.clone(),
            queue: queue.clone(),
            raw,
            submit,
            faults,
            queues: queues.words,
        };
        Ok((device, queue, transfer))
    };
    Some(open())
}

fn choose_queues(families: &[vk::QueueFamilyProperties]) -> Queues {
    use vk::QueueFlags as F;
    let other = F::GRAPHICS | F::COMPUTE | F::VIDEO_DECODE_KHR | F::VIDEO_ENCODE_KHR | F::OPTICAL_FLOW_NV;
    let transfer_only = families
        .iter()
        .position(|family| family.queue_flags.contains(F::TRANSFER) && !family.queue_flags.intersects(other));
    match transfer_only {
        Some(family) if families[family].queue_count > 1 => {
            let words = "two transfer queues, one for each direction";
            Queues { family: family as u32, to_device: 0, to_host: 1, own: true, words }
        }
        Some(family) => {
            let words = "one transfer queue for both directions";
            Queues { family: family as u32, to_device: 0, to_host: 0, own: true, words }
        }
        // Queue 0 of family 0 is wgpu's.
        None if families[0].queue_count > 2 => {
            let words = "two more queues of the compute family";
            Queues { family: 0, to_device: 1, to_host: 2, own: true, words }
        }
        None if families[0].queue_count > 1 => {
            let words = "a second queue of the compute family";
            Queues { family: 0, to_device: 1, to_host: 1, own: true, words }
        }
        None => {
            let words = "the compute queue itself, as the adapter has no other: copies and kernels take turns";
            Queues { family: 0, to_device: 0, to_host: 0, own: false, words }
        }
    }
}

impl VulkanTransfer {
    fn timeline(&self, line: Line) -> &Timeline {
        match line {
            Line::Compute => &self.computed,
            Line::ToDevice => &self.to_device.timeline,
            Line::ToHost => &self.to_host.timeline,
        }
    }

    fn copy_line(&self, line: Line) -> &CopyLine {
        match line {
            Line::ToDevice => &self.to_device,
            Line::ToHost => &self.to_host,
            Line::Compute => unreachable!("kernels are submitted, not copied"),
        }
    }

    fn vulkan(&self, doing: &str) -> impl Fn(vk::Result) -> GpuError {
        move |error| {
            if error == vk::Result::ERROR_DEVICE_LOST {
                self.faults.set(format!("{doing}: {error}"));
            }
            GpuError::Lost(format!("{doing}: {error}"))
        }
    }

    /// Every ticket has been submitted: invariant (a) of the module.
    fn assert_submitted(&self, after: &[Ticket]) {
        for ticket in after {
            let submitted = self.timeline(ticket.line).submitted.load(Acquire);
            debug_assert!(ticket.value <= submitted, "{ticket:?} is waited for before it was submitted ({submitted})");
        }
    }

    fn lock(mutex: &Mutex<()>) -> MutexGuard<'_, ()> {
        mutex.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// The latest ticket of each line, as a later one stands for all before it.
fn latest(after: &[Ticket]) -> impl Iterator<Item = Ticket> {
    [Line::Compute, Line::ToDevice, Line::ToHost]
        .into_iter()
        .filter_map(|line| after.iter().filter(|ticket| ticket.line == line && ticket.value > 0).max().copied())
}

impl Transfer for VulkanTransfer {
    fn describe(&self) -> String {
        self.queues.to_owned()
    }

    fn shared_buffer(&self, _what: &str, bytes: u64) -> Result<SharedBuffer, String> {
        let buffer = Arc::new(self.raw.allocate(bytes, &device_preference()).map_err(|error| error.to_string())?);
        let raw = wrap(&self.device, &buffer, bytes);
        Ok(SharedBuffer { raw, handle: Some((buffer.buffer, buffer)) })
    }

    fn host_memory(
        &self,
        what: &str,
        bytes: u64,
        view: bool,
    ) -> Result<(HostMemory, Option<wgpu::Buffer>), HostMemoryRefused> {
        let refused = |cause: String| HostMemoryRefused { what: what.to_owned(), needed: bytes, cause };
        if self.raw.faults.pinned_refused && !view {
            return Err(refused(vk::Result::ERROR_OUT_OF_HOST_MEMORY.to_string()));
        }
        let buffer = self.raw.allocate(bytes, &host_preference()).map_err(|error| refused(error.to_string()))?;
        // SAFETY: the memory was allocated from a host-visible type and is mapped once, for as long as it lives.
        let pointer =
            unsafe { self.raw.device.map_memory(buffer.memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty()) };
        let pointer = pointer.map_err(|error| refused(error.to_string()))?;
        let pointer = NonNull::new(pointer.cast::<u8>()).ok_or_else(|| refused("the driver mapped it at 0".into()))?;
        let buffer = Arc::new(buffer);
        let view = view.then(|| wrap(&self.device, &buffer, bytes));
        Ok((HostMemory { pointer, bytes, handle: buffer.buffer, keep: buffer }, view))
    }

    fn import(&self, what: &str, pointer: *mut u8, bytes: u64, keep: Keep) -> Result<HostMemory, HostMemoryRefused> {
        let refused = |cause: String| HostMemoryRefused { what: what.to_owned(), needed: bytes, cause };
        if self.raw.faults.import_refused {
            return Err(refused(vk::Result::ERROR_OUT_OF_DEVICE_MEMORY.to_string()));
        }
        let at = NonNull::new(pointer).ok_or_else(|| refused("it lies at address 0".into()))?;
        let buffer = Arc::new(self.raw.import(pointer, bytes, keep).map_err(refused)?);
        Ok(HostMemory { pointer: at, bytes, handle: buffer.buffer, keep: buffer })
    }

    fn kernels_reach_host(&self) -> bool {
        true
    }

    fn submit(&self, commands: wgpu::CommandBuffer, after: &[Ticket]) -> Result<Ticket, GpuError> {
        self.assert_submitted(after);
        let _submit = Self::lock(&self.submit);
        let value = self.computed.submitted.load(Relaxed) + 1;
        // SAFETY: semaphores of this device; they are staged and taken under the lock.
        let hal = unsafe { self.queue.as_hal::<Vulkan>() }.expect("a Vulkan queue");
        let waits: Vec<Ticket> = latest(after).filter(|ticket| ticket.line != Line::Compute).collect();
        for ticket in &waits {
            let semaphore = self.timeline(ticket.line).semaphore;
            hal.add_wait_semaphore(semaphore, Some(ticket.value), vk::PipelineStageFlags::ALL_COMMANDS);
        }
        hal.add_signal_semaphore(self.computed.semaphore, Some(value));
        self.queue.submit([commands]);
        if hal.remove_signal_semaphore(self.computed.semaphore) {
            // wgpu refused the submission before it reached the driver: what was staged must not join the next one.
            for ticket in &waits {
                hal.remove_wait_semaphore(self.timeline(ticket.line).semaphore);
            }
            self.faults.check()?;
            return Err(GpuError::Lost("a submission was refused".to_owned()));
        }
        self.computed.submitted.store(value, Release);
        self.faults.check()?;
        self.faults.count_submission(&self.raw.faults)?;
        Ok(Ticket { line: Line::Compute, value })
    }

    fn copy(&self, line: Line, copies: &[CopyRange<'_>], after: &[Ticket]) -> Result<Ticket, GpuError> {
        self.assert_submitted(after);
        self.faults.check()?;
        let lane = self.copy_line(line);
        let mut ring = lane.ring.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let index = ring.next;
        ring.next = (index + 1) % DEPTH;
        let before = ring.places[index].value;
        if before > 0 {
            self.wait(Ticket { line, value: before })?;
        }
        ring.retire(&self.raw, index);
        let (device, queries) = (&self.raw.device, ring.queries);
        let commands = ring.places[index].commands;
        // SAFETY: the command buffer is idle; buffers are kept until it has run; ranges lie within them (asserted where
        // they are made); structures live until the calls return.
        unsafe {
            let begin = vk::CommandBufferBeginInfo::default().flags(vk::CommandBufferUsageFlags::ONE_TIME_SUBMIT);
            device.begin_command_buffer(commands, &begin).map_err(self.vulkan("recording a copy"))?;
            if let Some(queries) = queries {
                device.reset_query_pool(queries, 2 * index as u32, 2);
                device.cmd_write_timestamp(commands, vk::PipelineStageFlags::TOP_OF_PIPE, queries, 2 * index as u32);
            }
            // Copies between the same two buffers become one command.
            for group in copies.chunk_by(|a, b| (a.from.handle, a.to.handle) == (b.from.handle, b.to.handle)) {
                let regions: Vec<vk::BufferCopy> = group
                    .iter()
                    .filter(|copy| copy.bytes > 0)
                    .map(|copy| vk::BufferCopy {
                        src_offset: copy.from.offset,
                        dst_offset: copy.to.offset,
                        size: copy.bytes,
                    })
                    .collect();
                let (from, to) = (group[0].from.handle, group[0].to.handle);
                assert!(from != vk::Buffer::null() && to != vk::Buffer::null(), "copies need shared buffers");
                if !regions.is_empty() {
                    device.cmd_copy_buffer(commands, from, to, &regions);
                }
            }
            if line == Line::ToHost {
                // A semaphore alone does not make what the device wrote visible to the host.
                let barrier = vk::MemoryBarrier::default()
                    .src_access_mask(vk::AccessFlags::TRANSFER_WRITE)
                    .dst_access_mask(vk::AccessFlags::HOST_READ);
                device.cmd_pipeline_barrier(
                    commands,
                    vk::PipelineStageFlags::TRANSFER,
                    vk::PipelineStageFlags::HOST,
                    vk::DependencyFlags::empty(),
                    &[barrier],
                    &[],
                    &[],
                );
            }
            if let Some(queries) = queries {
                let last = vk::PipelineStageFlags::BOTTOM_OF_PIPE;
                device.cmd_write_timestamp(commands, last, queries, 2 * index as u32 + 1);
            }
            device.end_command_buffer(commands).map_err(self.vulkan("recording a copy"))?;
            let (semaphores, values): (Vec<_>, Vec<_>) =
                latest(after).map(|ticket| (self.timeline(ticket.line).semaphore, ticket.value)).unzip();
            let stages = vec![vk::PipelineStageFlags::ALL_COMMANDS; semaphores.len()];
            let _queue = Self::lock(&lane.lock);
            let value = lane.timeline.submitted.load(Relaxed) + 1;
            let (commands, signals, signal_values) = ([commands], [lane.timeline.semaphore], [value]);
            let mut timeline = vk::TimelineSemaphoreSubmitInfo::default()
                .wait_semaphore_values(&values)
                .signal_semaphore_values(&signal_values);
            let submit = vk::SubmitInfo::default()
                .command_buffers(&commands)
                .wait_semaphores(&semaphores)
                .wait_dst_stage_mask(&stages)
                .signal_semaphores(&signals)
                .push_next(&mut timeline);
            device.queue_submit(lane.queue, &[submit], vk::Fence::null()).map_err(self.vulkan("submitting a copy"))?;
            lane.timeline.submitted.store(value, Release);
            let place = &mut ring.places[index];
            place.value = value;
            place.timed = queries.is_some();
            for end in copies.iter().flat_map(|copy| [copy.from.keep, copy.to.keep]).flatten() {
                if !place.keep.iter().any(|held| Arc::ptr_eq(held, end)) {
                    place.keep.push(end.clone());
                }
            }
            Ok(Ticket { line, value })
        }
    }

    fn download(&self, encoder: &mut wgpu::CommandEncoder, from: Slice<'_>, to: &HostBuffer, at: u64) {
        let view = to.view.as_ref().expect("a buffer that is downloaded to was made with a view");
        encoder.copy_buffer_to_buffer(from.raw, from.offset, view, at, from.size.next_multiple_of(4));
    }

    fn wait(&self, ticket: Ticket) -> Result<(), GpuError> {
        self.assert_submitted(&[ticket]);
        loop {
            self.faults.check()?;
            match self.timeline(ticket.line).wait(ticket.value, GLANCE) {
                Ok(()) => return self.faults.check(),
                Err(vk::Result::TIMEOUT) => {}
                Err(error) => return Err(self.vulkan("waiting for the device")(error)),
            }
        }
    }

    fn take_ticks(&self, ticket: Ticket) -> Option<Ticks> {
        let mut ring = self.copy_line(ticket.line).ring.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(index) = ring.places.iter().position(|place| place.value == ticket.value) {
            ring.retire(&self.raw, index);
        }
        ring.ticks.remove(&ticket.value)
    }

    fn clock(&self) -> Option<(u64, Instant)> {
        let calibrated = self.raw.calibrated.as_ref()?;
        let info = [vk::CalibratedTimestampInfoKHR::default().time_domain(vk::TimeDomainKHR::DEVICE)];
        let before = Instant::now();
        // SAFETY: the structure lives until the call returns.
        let (ticks, _) = unsafe { calibrated.get_calibrated_timestamps(&info).ok()? };
        let after = Instant::now();
        Some((ticks[0], before + (after - before) / 2))
    }

    fn exclusively(&self, f: &mut dyn FnMut()) {
        let _submit = Self::lock(&self.submit);
        f();
    }
}

/// A raw buffer as wgpu sees it. wgpu's own uses keep it alive, and so does whoever holds the `Arc`.
fn wrap(device: &wgpu::Device, buffer: &Arc<RawBuffer>, bytes: u64) -> wgpu::Buffer {
    let keep = buffer.clone();
    let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
    let descriptor = wgpu::BufferDescriptor { label: None, size: bytes, usage, mapped_at_creation: false };
    // SAFETY: the VkBuffer has that size and those usages, and lives until wgpu drops the callback.
    unsafe {
        let hal =
            <Vulkan as wgpu::hal::Api>::Buffer::from_raw_externally_owned(buffer.buffer, Box::new(move || drop(keep)));
        device.create_buffer_from_hal::<Vulkan>(hal, &descriptor)
    }
}

impl Drop for VulkanTransfer {
    fn drop(&mut self) {
        // Everything submitted has run, or the device is lost and nothing runs any more.
        for line in [Line::Compute, Line::ToDevice, Line::ToHost] {
            let timeline = self.timeline(line);
            let _ = timeline.wait(timeline.submitted.load(Acquire), Duration::from_secs(10));
        }
        for lane in [&self.to_device, &self.to_host] {
            let ring = lane.ring.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            // SAFETY: the copies have run.
            unsafe {
                self.raw.device.destroy_command_pool(ring.pool, None);
                if let Some(queries) = ring.queries {
                    self.raw.device.destroy_query_pool(queries, None);
                }
            }
        }
    }
}
