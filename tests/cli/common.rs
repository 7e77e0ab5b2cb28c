//! Running the binary, and making and reading its files.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// Longer than any run takes on a software adapter beside others; what takes longer hangs.
const DEADLINE: Duration = Duration::from_secs(120);

pub fn example(file: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(file)
}

/// A folder that goes when the test ends.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(tempfile::tempdir().expect("a temporary folder"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A file of batch lines.
    pub fn lines(&self, name: &str, lines: &[Value]) -> PathBuf {
        let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
        self.write(name, text)
    }

    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("a temporary file");
        path
    }

    /// A copy of the shipped model, to be damaged.
    pub fn model(&self) -> PathBuf {
        let copy = self.path("model");
        std::fs::create_dir(&copy).expect("a temporary folder");
        for entry in std::fs::read_dir(example("model")).expect("shipped model") {
            let entry = entry.expect("shipped model");
            std::fs::copy(entry.path(), copy.join(entry.file_name())).expect("copied");
        }
        copy
    }
}

/// The command line, one word after another; paths may be among them.
pub struct Call {
    command: Command,
    stdin: Vec<u8>,
    stdout: Stdio,
    deadline: Duration,
}

/// `fulmen WORDS`, in an environment that has none of its variables but the choice of the adapter.
pub fn fulmen<const N: usize>(words: [&str; N]) -> Call {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fulmen"));
    for (name, _) in std::env::vars_os() {
        let ours = name.to_string_lossy().starts_with("FULMEN_") && name != "FULMEN_DEVICE";
        if ours || name == "RUST_LOG" {
            command.env_remove(name);
        }
    }
    // What somebody measured on this machine must not choose for the tests.
    command.env("FULMEN_CACHE_DIR", std::env::temp_dir().join("fulmen-tests-without-a-cache"));
    command.env("RUST_BACKTRACE", "0").args(words);
    Call { command, stdin: Vec::new(), stdout: Stdio::piped(), deadline: DEADLINE }
}

/// `fulmen run-batch` of the shipped model.
pub fn run_batch(input: &Path, output: &Path) -> Call {
    fulmen(["run-batch"]).path("--model", &example("model")).path("-i", input).path("-o", output)
}

/// `fulmen generate` of the shipped model.
pub fn generate<const N: usize>(words: [&str; N]) -> Call {
    fulmen(["generate"]).path("--model", &example("model")).words(words)
}

impl Call {
    pub fn words<const N: usize>(mut self, words: [&str; N]) -> Self {
        self.command.args(words);
        self
    }

    pub fn path(mut self, option: &str, path: &Path) -> Self {
        self.command.arg(option).arg(path);
        self
    }

    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Gives it this file or pipe as stdout.
    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.stdout = stdout.into();
        self
    }

    /// For what is meant to take long.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Starts it; its stderr can be followed.
    pub fn start(mut self) -> Running {
        let words = format!("{:?}", self.command);
        self.command.stdin(Stdio::piped()).stdout(self.stdout).stderr(Stdio::piped());
        let mut child = self.command.spawn().expect("the binary starts");
        let mut stdin = child.stdin.take().expect("piped");
        std::thread::spawn(move || {
            let _ = stdin.write_all(&self.stdin); // a command that is refused does not read it
        });
        let stdout = child.stdout.take().map(|mut stdout| {
            std::thread::spawn(move || {
                let mut bytes = Vec::new();
                stdout.read_to_end(&mut bytes).expect("stdout can be read");
                bytes
            })
        });
        let (send, lines) = channel();
        let stderr = BufReader::new(child.stderr.take().expect("piped"));
        std::thread::spawn(move || {
            for line in stderr.lines() {
                let _ = send.send(line.expect("stderr is text"));
            }
        });
        let (started, deadline) = (Instant::now(), self.deadline);
        Running { words, child, stdout, lines, stderr: String::new(), started, deadline }
    }

    /// Runs it to its end.
    pub fn run(self) -> Ran {
        self.start().finish()
    }
}

/// A command that has not ended.
pub struct Running {
    words: String,
    child: Child,
    stdout: Option<JoinHandle<Vec<u8>>>,
    lines: Receiver<String>,
    stderr: String,
    started: Instant,
    deadline: Duration,
}

impl Running {
    fn check_deadline(&mut self, waiting_for: &str) {
        if self.started.elapsed() > self.deadline {
            let _ = self.child.kill();
            self.stderr.extend(self.lines.iter().map(|line| line + "\n"));
            panic!("{}: no {waiting_for} after {:?}; stderr:\n{}", self.words, self.deadline, self.stderr);
        }
        std::thread::sleep(Duration::from_millis(1));
    }

    /// Waits until a file has so many whole lines; `meanwhile` is called now and then. The command must not end before.
    pub fn wait_for_lines_and(&mut self, path: &Path, n: usize, mut meanwhile: impl FnMut(&Running)) {
        let (mut read, mut lines) = (0, 0);
        loop {
            // Only what came since: a long run's file is large.
            if let Ok(mut file) = File::open(path) {
                let mut new = Vec::new();
                file.seek(SeekFrom::Start(read)).expect("a file");
                file.read_to_end(&mut new).expect("a file");
                read += new.len() as u64;
                lines += new.iter().filter(|byte| **byte == b'\n').count();
            }
            if lines >= n {
                return;
            }
            self.check_deadline("output lines");
            meanwhile(self);
            if let Some(status) = self.child.try_wait().expect("a child") {
                self.stderr.extend(self.lines.iter().map(|line| line + "\n"));
                panic!("{}: ended with {status} before {n} lines were written; stderr:\n{}", self.words, self.stderr);
            }
        }
    }

    /// Waits until a file has so many whole lines. The command must not end before.
    pub fn wait_for_lines(&mut self, path: &Path, n: usize) {
        self.wait_for_lines_and(path, n, |_| {});
    }

    /// Waits until a line on stderr begins so.
    pub fn wait_for_message(&mut self, start: &str) {
        loop {
            while let Ok(line) = self.lines.try_recv() {
                self.stderr.push_str(&line);
                self.stderr.push('\n');
                if line.starts_with(start) {
                    return;
                }
            }
            self.check_deadline(start);
        }
    }

    /// Resident memory now, in bytes; None when it has ended.
    pub fn resident_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
    }

    /// It has ended.
    pub fn has_ended(&mut self) -> bool {
        self.check_deadline("end");
        self.child.try_wait().expect("a child").is_some()
    }

    /// Sends a signal.
    pub fn signal(&mut self, signal: i32) {
        // SAFETY: kill takes two numbers; the child has not been waited for, so the id is its own.
        let sent = unsafe { libc::kill(self.child.id() as libc::pid_t, signal) };
        assert_eq!(sent, 0, "{}: signal {signal} is sent", self.words);
    }

    pub fn finish(mut self) -> Ran {
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            self.check_deadline("end");
        };
        // The channel ends with stderr, so that nothing is missing.
        self.stderr.extend(self.lines.iter().map(|line| line + "\n"));
        let stdout = self.stdout.map_or(Vec::new(), |thread| thread.join().expect("stdout was read"));
        let stdout = String::from_utf8(stdout).expect("stdout is text");
        let ran = Ran { words: self.words, code: status.code(), stdout, stderr: self.stderr };
        assert!(!ran.stderr.contains("panicked"), "a panic in {ran:?}");
        ran
    }
}

/// A command that has ended.
#[derive(Debug)]
pub struct Ran {
    #[allow(dead_code, reason = "shown when an assertion fails")]
    words: String,
    /// None where a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Ended with this code.
    #[track_caller]
    pub fn ends(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "exit code of {self:#?}");
        self
    }

    /// stderr has all of these.
    #[track_caller]
    pub fn says<const N: usize>(self, parts: [&str; N]) -> Self {
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is not in the messages of {self:#?}");
        }
        self
    }

    /// stdout has all of these.
    #[track_caller]
    pub fn prints<const N: usize>(self, parts: [&str; N]) -> Self {
        for part in parts {
            assert!(self.stdout.contains(part), "{part:?} is not in what {self:#?} prints");
        }
        self
    }

    /// Nothing on stdout.
    #[track_caller]
    pub fn prints_nothing(self) -> Self {
        assert_eq!(self.stdout, "", "stdout of {self:#?}");
        self
    }

    /// The object of --json-summary.
    #[track_caller]
    pub fn summary(&self) -> Value {
        let line = self.stderr.lines().find(|line| line.starts_with('{'));
        serde_json::from_str(line.unwrap_or_else(|| panic!("no summary in {self:#?}"))).expect("the summary is JSON")
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error} in {self:#?}"))
    }
}

/// What a results file says of each request.
pub type Results = BTreeMap<String, Value>;

/// The lines of a results file by custom_id, times taken out; each custom_id once, each line whole.
#[track_caller]
pub fn results(path: &Path) -> Results {
    results_of(&std::fs::read_to_string(path).expect("a results file"))
}

#[track_caller]
pub fn results_of(text: &str) -> Results {
    assert!(text.is_empty() || text.ends_with('\n'), "the last line is whole");
    let mut results = Results::new();
    for line in text.lines() {
        let mut line: Value = serde_json::from_str(line).expect("each line is JSON");
        if let Some(body) = line.pointer_mut("/response/body").and_then(Value::as_object_mut) {
            body.remove("created").expect("a time");
        }
        let id = line["custom_id"].as_str().map_or_else(|| format!("line {}", line["error"]["line"]), str::to_owned);
        // A line whose name was used before is told by its number.
        let id = if line["error"]["code"] == "duplicate_custom_id" { format!("{id} again") } else { id };
        assert!(results.insert(id.clone(), line).is_none(), "{id} is answered once");
    }
    results
}

/// Text of a result's first choice.
#[track_caller]
pub fn text(result: &Value) -> &str {
    let choice = &result["response"]["body"]["choices"][0];
    choice["message"]["content"].as_str().or(choice["text"].as_str()).unwrap_or_else(|| panic!("no text in {result}"))
}

pub fn completion(id: &str, body: Value) -> Value {
    json!({"custom_id": id, "method": "POST", "url": "/v1/completions", "body": body})
}

/// The `n` shipped tasks with the shortest prompts, all greedy: a software adapter is slow.
pub fn short_tasks(n: usize) -> Vec<Value> {
    let text = std::fs::read_to_string(example("tasks.jsonl")).expect("shipped tasks");
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_by_key(|line| line.len());
    lines[..n].iter().map(|line| serde_json::from_str(line).expect("JSON")).collect()
}

/// custom_id → right answer of the shipped tasks.
pub fn right_answers() -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(example("answers.jsonl")).expect("shipped answers");
    text.lines()
        .map(|line| {
            let value: Value = serde_json::from_str(line).expect("JSON");
            let field = |name: &str| value[name].as_str().expect("a string").to_owned();
            (field("custom_id"), field("answer"))
        })
        .collect()
}
