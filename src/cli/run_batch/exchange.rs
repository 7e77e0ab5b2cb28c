//! Lines on their way in and results on their way out, each on a thread of its own, so that no pass waits for a file.
//!
//! ```text
//! input ─▶ reader: parse, tokenise ─▶ queue ─▶ the engine's run ─▶ queue ─▶ writer: detokenise, write, sync ─▶ output
//! ```
//!
//! In: the batch file's lines. Out: a [`Request`] for each good one as there is room, an output line for each that is bad or answered.
//!
//! Guarantees: both queues are bounded, so memory does not grow with the file, however slow the disk is; the run waits for the input only
//! where it has nothing else to do; what was handed to the writer is in the file and on the disk when [`Exchange::finish`] returns;
//! after the first write that fails nothing more is written, and the run ends.

use std::collections::HashMap;
use std::io::BufRead;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::cli::open::Text;
use crate::request::batch_file::{
    BatchLine, BatchReadError, BatchReader, OutputLine, ResultWriter, WriterError, now_seconds,
};
use crate::request::{Request, RequestOutput};

/// Lines that are ready before there is room for them: those that one pass can finish, mostly.
const READ_AHEAD: usize = 256;
/// Results that wait for the disk before the run does.
const WRITE_BEHIND: usize = 1024;
/// How long a pass is held back for the next line. Lines of a file come much faster, so passes are filled from the first on; those of
/// a slow pipe come when they come.
const PATIENCE: Duration = Duration::from_millis(5);
/// How often a run without any work looks whether it was stopped.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What the reader found.
enum Read {
    Request(Box<(BatchLine, Request)>),
    /// Is answered with this line.
    Bad(Box<OutputLine>),
    /// The input cannot be read any further.
    Broken(BatchReadError),
    End,
}

/// What the writer is to write.
enum Write {
    Answer(Box<(BatchLine, RequestOutput)>),
    Line(Box<OutputLine>),
}

/// Numbers that the threads share.
#[derive(Default)]
struct Shared {
    already_finished: AtomicU64,
    answered: AtomicU64,
    failed: AtomicU64,
    /// The writer has given up.
    broken: AtomicBool,
}

/// What became of the lines.
pub struct Outcome {
    pub answered: u64,
    pub failed: u64,
    /// The first thing that went wrong with a file.
    pub fault: Option<anyhow::Error>,
}

/// See the module's text.
pub struct Exchange {
    read: Receiver<Read>,
    write: SyncSender<Write>,
    writer: JoinHandle<Result<(), WriterError>>,
    /// Lines between being read and being answered.
    pending: HashMap<String, BatchLine>,
    shared: Arc<Shared>,
    fault: Option<anyhow::Error>,
    ended: bool,
}

impl Exchange {
    /// Starts both threads. `vocab` = entries of a row of logits, `model` the name that is served.
    pub fn start<R: BufRead + Send + 'static>(
        reader: BatchReader<R>,
        writer: ResultWriter,
        text: Arc<Text>,
        vocab: usize,
        model: String,
    ) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let (read_sender, read) = sync_channel(READ_AHEAD);
        let (write, write_receiver) = sync_channel(WRITE_BEHIND);
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let (text_in, text_out) = (text.clone(), text);
        let (shared_in, shared_out) = (shared.clone(), shared.clone());
        // Nobody waits for its end: an input that never ends may block it for ever.
        thread("reader").spawn(move || read_lines(reader, &text_in, vocab, &shared_in, &read_sender))?;
        let writer =
            thread("writer").spawn(move || write_lines(writer, &text_out, &model, &shared_out, &write_receiver))?;
        Ok(Self { read, write, writer, pending: HashMap::new(), shared, fault: None, ended: false })
    }

    /// The next line as a request; bad lines are answered on the way. The end is also where a file broke, or where `stopped` says so.
    pub fn next_request(&mut self, wait: bool, stopped: &dyn Fn() -> bool) -> Poll<Option<Request>> {
        loop {
            if self.ended || self.broken() || stopped() {
                return Poll::Ready(None);
            }
            match self.read.recv_timeout(if wait { LOOK_EVERY } else { PATIENCE }) {
                Ok(Read::Request(both)) => {
                    let (line, request) = *both;
                    self.pending.insert(line.custom_id.clone(), line);
                    return Poll::Ready(Some(request));
                }
                Ok(Read::Bad(line)) => self.send(Write::Line(line)),
                Ok(Read::Broken(error)) => self.fault = Some(error.into()),
                Ok(Read::End) => self.ended = true,
                Err(RecvTimeoutError::Timeout) if wait => {}
                Err(RecvTimeoutError::Timeout) => return Poll::Pending,
                Err(RecvTimeoutError::Disconnected) => self.fault = Some(anyhow!("the thread that reads has panicked")),
            }
        }
    }

    /// A request is answered.
    pub fn finished(&mut self, output: RequestOutput) {
        let line = self.pending.remove(&output.custom_id).expect("each request is answered once");
        self.send(Write::Answer(Box::new((line, output))));
    }

    fn send(&mut self, what: Write) {
        // Without a receiver the writer has panicked: `finish` says so.
        if self.write.send(what).is_err() {
            self.shared.broken.store(true, Relaxed);
        }
    }

    /// A file broke, so there is no use in going on.
    pub fn broken(&self) -> bool {
        self.fault.is_some() || self.shared.broken.load(Relaxed)
    }

    /// Lines written so far.
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Relaxed)
    }

    /// Lines passed over so far, because an earlier run finished them.
    pub fn already_finished(&self) -> u64 {
        self.shared.already_finished.load(Relaxed)
    }

    /// Writes what is on its way, and puts it on the disk.
    pub fn finish(self) -> Outcome {
        drop(self.write);
        let written = match self.writer.join() {
            Ok(written) => written.map_err(anyhow::Error::from),
            Err(_) => Err(anyhow!("the thread that writes has panicked")),
        };
        let (answered, failed) = (self.shared.answered.load(Relaxed), self.shared.failed.load(Relaxed));
        Outcome { answered, failed, fault: self.fault.or(written.err()) }
    }
}

/// The reader's thread: until the input ends, or nobody listens any more.
fn read_lines<R: BufRead>(
    mut reader: BatchReader<R>,
    text: &Text,
    vocab: usize,
    shared: &Shared,
    to: &SyncSender<Read>,
) {
    loop {
        let line = reader.next();
        shared.already_finished.store(reader.already_finished(), Relaxed);
        let read = match line {
            None => Read::End,
            Some(Err(BatchReadError::Line(error))) => Read::Bad(Box::new(OutputLine::from(&error))),
            Some(Err(error)) => Read::Broken(error),
            Some(Ok(line)) => match line.to_request(&text.tokenizer, text.template.as_ref(), &text.defaults, vocab) {
                Ok(request) => Read::Request(Box::new((line, request))),
                Err(error) => Read::Bad(Box::new(OutputLine::from(&error))),
            },
        };
        let last = matches!(read, Read::Broken(_) | Read::End);
        if to.send(read).is_err() || last {
            return;
        }
    }
}

/// The writer's thread: until nothing more comes.
fn write_lines(
    mut writer: ResultWriter,
    text: &Text,
    model: &str,
    shared: &Shared,
    from: &Receiver<Write>,
) -> Result<(), WriterError> {
    let mut written = Ok(());
    for what in from {
        if written.is_err() {
            continue; // the run is about to notice
        }
        let line = match what {
            Write::Line(line) => *line,
            Write::Answer(both) => {
                let (line, mut output) = *both;
                output.make_texts(&text.tokenizer);
                match &output.result {
                    Ok(completions) => {
                        let (tokens, tokenizer) = (output.prompt_tokens, &text.tokenizer);
                        OutputLine::success(&line, completions, tokens, tokenizer, model, now_seconds())
                    }
                    Err(error) => OutputLine::failure(&line, error),
                }
            }
        };
        written = writer.write(&line);
        shared.broken.store(written.is_err(), Relaxed);
        shared.failed.fetch_add(line.error.is_some() as u64, Relaxed);
        shared.answered.fetch_add(1, Relaxed);
    }
    // Whatever happened, what is finished is on the disk before anything else is said.
    let synced = writer.sync();
    written.and(synced)
}
