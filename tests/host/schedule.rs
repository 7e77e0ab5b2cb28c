//! Schedules as data: what a builder makes passes `check`, what is broken does not, and the executor walks them in order.

use std::time::Duration;

use fulmen::execute::{Worker, run};
use fulmen::schedule::{GroupShape, Lane, PassShape, Schedule, ScheduleFault, Task, TaskId, Work, check, serial};
use proptest::prelude::*;

/// Decode rows that attend on the CPU.
const DECODE: GroupShape = GroupShape { gpu_attention: false, cpu_attention: true, kv_to_device: false, sampled: true };
/// Decode rows, and a later chunk of a prompt.
const MIXED: GroupShape = GroupShape { gpu_attention: true, cpu_attention: true, kv_to_device: true, sampled: true };

/// Two layers; the first chunk of experts is resident, the second comes in two pages.
fn small() -> PassShape {
    PassShape { layers: 2, groups: vec![DECODE, MIXED], chunk_pages: vec![0, 2] }
}

fn group_shapes() -> impl Strategy<Value = GroupShape> {
    any::<[bool; 4]>().prop_map(|[gpu_attention, cpu_attention, kv_to_device, sampled]| GroupShape {
        gpu_attention,
        cpu_attention,
        kv_to_device,
        sampled,
    })
}

fn pass_shapes() -> impl Strategy<Value = PassShape> {
    let groups = prop::collection::vec(group_shapes(), 1..5);
    let chunk_pages = prop::collection::vec(0usize..4, 1..5);
    (1usize..5, groups, chunk_pages).prop_map(|(layers, groups, chunk_pages)| PassShape { layers, groups, chunk_pages })
}

/// These tasks, each after the one before it.
fn chain(works: impl IntoIterator<Item = Work>) -> Schedule {
    let tasks = works.into_iter().enumerate();
    let tasks = tasks.map(|(index, work)| Task { work, after: index.checked_sub(1).map(TaskId).into_iter().collect() });
    Schedule { tasks: tasks.collect() }
}

proptest! {
    #[test]
    fn serial_schedules_are_sound(shape in pass_shapes()) {
        let schedule = serial(&shape);
        prop_assert_eq!(check(&schedule, &shape), Ok(()));
        // Pages come once a pass, whatever the number of groups.
        let pages = schedule.tasks.iter().filter(|task| matches!(task.work, Work::LoadPage { .. })).count();
        prop_assert_eq!(pages, shape.layers * shape.chunk_pages.iter().sum::<usize>());
    }

    /// No task can be left out, doubled, or moved to the front of what it needs.
    #[test]
    fn every_task_of_a_serial_schedule_counts(shape in pass_shapes(), at in any::<prop::sample::Index>()) {
        let works: Vec<Work> = serial(&shape).tasks.iter().map(|task| task.work).collect();
        let at = at.index(works.len());
        let work = works[at];
        let mut without = works.clone();
        without.remove(at);
        let fault = check(&chain(without), &shape);
        prop_assert_eq!(fault, Err(ScheduleFault::Count { work, count: 0 }));
        let mut twice = works.clone();
        twice.push(work);
        let fault = check(&chain(twice), &shape);
        prop_assert_eq!(fault, Err(ScheduleFault::Count { work, count: 2 }));
        let mut last = works.clone();
        last.remove(at);
        last.push(work);
        let is_sample = matches!(work, Work::Sample { .. });
        prop_assert_eq!(check(&chain(last), &shape).is_ok(), is_sample, "{:?} as the last task", work);
    }
}

#[test]
fn a_small_schedule_prints_like_this() {
    insta::assert_snapshot!(serial(&small()), @"
    step  layer  gpu                 h2d                 d2h                 cpu
       0      ·  embed b0            ·                   ·                   ·
       1      ·  embed b1            ·                   ·                   ·
       2      0  pre_attention b0    ·                   ·                   ·
       3      0  ·                   ·                   rows_to_host b0     ·
       4      0  ·                   ·                   ·                   attention b0
       5      0  ·                   rows_to_device b0   ·                   ·
       6      0  post_attention b0   ·                   ·                   ·
       7      0  ·                   kv_to_device b1     ·                   ·
       8      0  pre_attention b1    ·                   ·                   ·
       9      0  ·                   ·                   rows_to_host b1     ·
      10      0  ·                   ·                   ·                   attention b1
      11      0  gpu_attention b1    ·                   ·                   ·
      12      0  ·                   rows_to_device b1   ·                   ·
      13      0  post_attention b1   ·                   ·                   ·
      14      0  experts b0 c0       ·                   ·                   ·
      15      0  experts b1 c0       ·                   ·                   ·
      16      0  ·                   page 0.1.0          ·                   ·
      17      0  ·                   page 0.1.1          ·                   ·
      18      0  experts b0 c1       ·                   ·                   ·
      19      0  experts b1 c1       ·                   ·                   ·
      20      1  pre_attention b0    ·                   ·                   ·
      21      1  ·                   ·                   rows_to_host b0     ·
      22      1  ·                   ·                   ·                   attention b0
      23      1  ·                   rows_to_device b0   ·                   ·
      24      1  post_attention b0   ·                   ·                   ·
      25      1  ·                   kv_to_device b1     ·                   ·
      26      1  pre_attention b1    ·                   ·                   ·
      27      1  ·                   ·                   rows_to_host b1     ·
      28      1  ·                   ·                   ·                   attention b1
      29      1  gpu_attention b1    ·                   ·                   ·
      30      1  ·                   rows_to_device b1   ·                   ·
      31      1  post_attention b1   ·                   ·                   ·
      32      1  experts b0 c0       ·                   ·                   ·
      33      1  experts b1 c0       ·                   ·                   ·
      34      1  ·                   page 1.1.0          ·                   ·
      35      1  ·                   page 1.1.1          ·                   ·
      36      1  experts b0 c1       ·                   ·                   ·
      37      1  experts b1 c1       ·                   ·                   ·
      38      ·  head b0             ·                   ·                   ·
      39      ·  ·                   ·                   ·                   sample b0
      40      ·  head b1             ·                   ·                   ·
      41      ·  ·                   ·                   ·                   sample b1
    ");
}

#[test]
fn a_task_that_waits_for_a_later_one_is_a_fault() {
    for after in [5, 6, 1000] {
        let mut schedule = serial(&small());
        schedule.tasks[5].after = vec![TaskId(after)];
        let work = schedule.tasks[5].work;
        assert_eq!(check(&schedule, &small()), Err(ScheduleFault::WaitsForLater { task: 5, work, after }));
    }
}

#[test]
fn a_task_that_the_pass_does_not_need_is_a_fault() {
    for work in [
        Work::RowsToDevice { layer: 0, group: 2 },
        Work::GpuAttention { layer: 0, group: 0 },
        Work::KvToDevice { layer: 1, group: 0 },
        Work::PreAttention { layer: 2, group: 0 },
        Work::LoadPage { layer: 0, chunk: 0, page: 0 },
        Work::LoadPage { layer: 0, chunk: 1, page: 2 },
        Work::Experts { layer: 0, group: 0, chunk: 2 },
        Work::Head { group: 2 },
    ] {
        let mut works: Vec<Work> = serial(&small()).tasks.iter().map(|task| task.work).collect();
        works.insert(7, work);
        assert_eq!(check(&chain(works), &small()), Err(ScheduleFault::NotNeeded { task: 7, work }));
    }
}

/// Each line moves one task to the front of another that it needs.
#[test]
fn a_task_in_front_of_what_it_needs_is_a_fault() {
    let (layer, group) = (1, 1);
    let experts = |layer, chunk| Work::Experts { layer, group, chunk };
    let cases = [
        (Work::PreAttention { layer: 0, group }, Work::Embed { group }),
        (Work::PreAttention { layer, group }, experts(0, 1)),
        (Work::PreAttention { layer, group }, Work::KvToDevice { layer, group }),
        (Work::RowsToHost { layer, group }, Work::PreAttention { layer, group }),
        (Work::CpuAttention { layer, group }, Work::RowsToHost { layer, group }),
        (Work::RowsToDevice { layer, group }, Work::CpuAttention { layer, group }),
        (Work::PostAttention { layer, group }, Work::GpuAttention { layer, group }),
        (Work::PostAttention { layer, group }, Work::RowsToDevice { layer, group }),
        (experts(layer, 0), Work::PostAttention { layer, group }),
        (experts(layer, 1), Work::LoadPage { layer, chunk: 1, page: 0 }),
        (experts(layer, 1), Work::LoadPage { layer, chunk: 1, page: 1 }),
        (Work::Head { group }, experts(layer, 1)),
        (Work::Sample { group }, Work::Head { group }),
    ];
    for (work, needed) in cases {
        let mut works: Vec<Work> = serial(&small()).tasks.iter().map(|task| task.work).collect();
        let place = |works: &[Work], work| works.iter().position(|other| *other == work).expect("it is there");
        let from = place(&works, work);
        works.remove(from);
        let to = place(&works, needed);
        works.insert(to, work);
        let fault = check(&chain(works), &small()).expect_err("broken");
        assert_eq!(fault, ScheduleFault::Unordered { task: to, work, needed }, "{fault}");
    }
}

/// Nothing in its own pass reads the keys and values of a prompt's rows, but the group's next pass does.
#[test]
fn ids_that_are_known_before_keys_and_values_are_stored_are_a_fault() {
    let prompt = GroupShape { gpu_attention: true, cpu_attention: false, kv_to_device: false, sampled: true };
    let shape = PassShape { layers: 1, groups: vec![prompt], chunk_pages: vec![1] };
    let mut works: Vec<Work> = serial(&shape).tasks.iter().map(|task| task.work).collect();
    let (work, needed) = (Work::Sample { group: 0 }, Work::CpuAttention { layer: 0, group: 0 });
    works.retain(|work| *work != needed);
    works.push(needed);
    let fault = ScheduleFault::Unordered { task: works.len() - 2, work, needed };
    assert_eq!(check(&chain(works), &shape), Err(fault));
}

#[test]
fn chunks_out_of_order_are_a_fault() {
    let mut works: Vec<Work> = serial(&small()).tasks.iter().map(|task| task.work).collect();
    let of_chunk = |chunk| Work::Experts { layer: 1, group: 1, chunk };
    let place = |chunk| works.iter().position(|work| *work == of_chunk(chunk)).expect("it is there");
    let (first, second) = (place(0), place(1));
    works[first..=second].rotate_left(1);
    let fault = ScheduleFault::Unordered { task: second - 1, work: of_chunk(1), needed: of_chunk(0) };
    assert_eq!(check(&chain(works), &small()), Err(fault));
}

/// The order of the list is not enough: lanes run at the same time.
#[test]
fn a_task_that_does_not_wait_for_what_it_needs_is_a_fault() {
    let mut schedule = serial(&small());
    let place = schedule.tasks.iter().position(|task| task.work == Work::CpuAttention { layer: 1, group: 0 });
    let place = place.expect("it is there");
    schedule.tasks[place].after.clear();
    let fault = check(&schedule, &small()).expect_err("broken");
    let needed = Work::RowsToHost { layer: 1, group: 0 };
    assert_eq!(fault, ScheduleFault::Unordered { task: place, work: schedule.tasks[place].work, needed });
    assert_eq!(
        fault.to_string(),
        format!(
            "task {place} (CpuAttention {{ layer: 1, group: 0 }}) may start before RowsToHost {{ layer: 1, group: 0 }} has ended"
        )
    );
}

/// A device whose tasks take a known time and whose results show which tasks made them, in which order.
struct Fake {
    /// One number per group: what its rows went through.
    state: Vec<u64>,
    time: fn(Lane) -> Duration,
    /// This task computes something wrong.
    wrong: Option<Work>,
    fails: Option<Work>,
    ran: Vec<Work>,
}

impl Fake {
    fn new(groups: usize) -> Self {
        Fake { state: vec![1; groups], time: |_| Duration::ZERO, wrong: None, fails: None, ran: Vec::new() }
    }
}

#[derive(Debug, thiserror::Error)]
#[error("no memory left")]
struct NoMemory;

impl Worker for Fake {
    type Error = NoMemory;

    fn perform(&mut self, task: &Task) -> Result<(), NoMemory> {
        if self.fails == Some(task.work) {
            return Err(NoMemory);
        }
        self.ran.push(task.work);
        std::thread::sleep((self.time)(task.work.lane()));
        let groups = match task.work {
            Work::LoadPage { .. } => 0..self.state.len(), // all groups' rows meet its experts
            work => {
                let group = (0..self.state.len()).find(|group| work.to_string().contains(&format!("b{group}")));
                let group = group.expect("a group's task says which");
                group..group + 1
            }
        };
        let name = format!("{:?}{}", task.work.layer(), task.work.name());
        for state in &mut self.state[groups] {
            let before = state.wrapping_add((self.wrong == Some(task.work)) as u64);
            *state = name.bytes().fold(before, |hash, byte| (hash ^ byte as u64).wrapping_mul(0x100_0000_01b3));
        }
        Ok(())
    }
}

#[test]
fn the_executor_runs_every_task_in_order_and_times_it() {
    let schedule = serial(&small());
    let time = |lane| match lane {
        Lane::Gpu => Duration::from_micros(300),
        Lane::HostToDevice => Duration::from_micros(700),
        Lane::DeviceToHost => Duration::from_micros(100),
        Lane::Cpu => Duration::from_micros(500),
    };
    let mut fake = Fake { time, ..Fake::new(2) };
    let timeline = run(&schedule, &mut fake).expect("nothing fails");
    let works: Vec<Work> = schedule.tasks.iter().map(|task| task.work).collect();
    assert_eq!(fake.ran, works);
    assert_eq!(timeline.spans.len(), works.len());
    let mut clock = Duration::ZERO;
    for (span, (id, task)) in timeline.spans.iter().zip(schedule.ids()) {
        assert_eq!((span.task, span.work), (id, task.work));
        assert!(span.start >= clock, "one after the other");
        assert!(span.end - span.start >= time(task.work.lane()));
        clock = span.end;
    }
    for lane in Lane::ALL {
        let tasks = works.iter().filter(|work| work.lane() == lane).count() as u32;
        assert!(tasks > 0 && timeline.busy(lane) >= tasks * time(lane), "{}", lane.name());
    }
    let busy: Duration = Lane::ALL.map(|lane| timeline.busy(lane)).iter().sum();
    assert!(timeline.duration() >= busy && timeline.duration() <= clock);
}

#[test]
fn a_task_that_fails_is_named_and_nothing_runs_after_it() {
    let schedule = serial(&small());
    for (index, task) in schedule.tasks.iter().enumerate() {
        let mut fake = Fake { fails: Some(task.work), ..Fake::new(2) };
        let error = run(&schedule, &mut fake).expect_err("a task fails");
        assert_eq!(fake.ran.len(), index);
        assert!(error.task.starts_with(&task.work.to_string()), "{error}");
        if let Some(layer) = task.work.layer() {
            assert!(error.task.ends_with(&format!(" of layer {layer}")), "{error}");
        }
    }
    let attention = Work::CpuAttention { layer: 1, group: 1 };
    let error = run(&schedule, &mut Fake { fails: Some(attention), ..Fake::new(2) }).expect_err("a task fails");
    assert_eq!(error.to_string(), "attention b1 of layer 1: no memory left");
}

/// A schedule changes time, never results: another sound order of groups gives the same, and a wrong result of one task
/// shows in its group and in no other.
#[test]
fn another_order_of_groups_gives_the_same_results() {
    let shape = small();
    let result = |schedule: &Schedule, wrong| {
        let mut fake = Fake { wrong, ..Fake::new(2) };
        run(schedule, &mut fake).expect("nothing fails");
        fake.state
    };
    // Group 1's attention in front of group 0's, in every layer.
    let mut works: Vec<Work> = serial(&shape).tasks.iter().map(|task| task.work).collect();
    for layer in 0..shape.layers {
        let of = |work: &Work, wanted: &str| work.layer() == Some(layer) && work.to_string().ends_with(wanted);
        let start = works.iter().position(|work| of(work, "b0")).expect("group 0 attends");
        let middle = works.iter().position(|work| of(work, "b1")).expect("group 1 attends");
        let end = works.iter().position(|work| *work == Work::PostAttention { layer, group: 1 }).expect("it ends") + 1;
        works[start..end].rotate_left(middle - start);
    }
    let other = chain(works);
    assert_ne!(other, serial(&shape));
    assert_eq!(check(&other, &shape), Ok(()));
    let right = result(&serial(&shape), None);
    assert_eq!(result(&other, None), right);
    for (_, task) in serial(&shape).ids().filter(|(_, task)| !matches!(task.work, Work::LoadPage { .. })) {
        let wrong = result(&other, Some(task.work));
        let differs = |group: usize| wrong[group] != right[group];
        let group = usize::from(task.work.to_string().contains("b1"));
        assert!(differs(group) && !differs(1 - group), "{}", task.work);
    }
}
