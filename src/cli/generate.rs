//! `fulmen generate`: one prompt or chat message, from arguments or stdin, text shown as it comes.

use std::io::{IsTerminal, Read, Write};
use std::ops::ControlFlow;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::open::{EngineArguments, ModelArguments, load};
use super::{Usage, print_line};
use crate::engine::{Event, RunOptions};
use crate::plan::workload::Workload;
use crate::request::batch_file::{
    BatchLine, Body, ChatBody, CompletionsBody, OutputLine, Prompt, SamplingFields, now_seconds,
};
use crate::request::chat_template::Message;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// Text to continue [default: stdin]
    #[arg(short, long, conflicts_with = "chat", value_name = "TEXT")]
    prompt: Option<String>,
    /// Message to answer, through the chat template; without a text, stdin is the message
    #[arg(long, num_args = 0..=1, default_missing_value = "", value_name = "TEXT")]
    chat: Option<String>,
    /// System message in front of --chat
    #[arg(long, requires = "chat", conflicts_with = "prompt", value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    sampling: SamplingArguments,
    /// Print one JSON object with all completions at the end, instead of text as it comes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArguments,
    #[command(flatten)]
    trace: super::trace::Arguments,
}

/// Fields of the request. What is not said comes from the checkpoint's generation_config.json, else it is vLLM's default.
#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
struct SamplingArguments {
    /// Most tokens to generate [default: until the context is full]
    #[arg(short = 'n', long, visible_aliases = ["max-new-tokens", "gen-len"], value_name = "N")]
    max_tokens: Option<usize>,
    /// No end before so many tokens
    #[arg(long, value_name = "N")]
    min_tokens: Option<usize>,
    /// 0 takes the likeliest token
    #[arg(long, allow_negative_numbers = true, value_name = "T")]
    temperature: Option<f32>,
    #[arg(long, value_name = "K")]
    top_k: Option<usize>,
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    top_p: Option<f32>,
    #[arg(long, allow_negative_numbers = true, value_name = "P")]
    min_p: Option<f32>,
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    repetition_penalty: Option<f32>,
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    presence_penalty: Option<f32>,
    #[arg(long, allow_negative_numbers = true, value_name = "X")]
    frequency_penalty: Option<f32>,
    /// The same seed gives the same text [default: 0]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Text that ends a completion; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Go on past the end-of-sequence token
    #[arg(long)]
    ignore_eos: bool,
    /// Completions of the prompt; more than one needs --json
    #[arg(long, value_name = "N")]
    num_completions: Option<usize>,
    /// Log-probabilities of so many alternatives; needs --json
    #[arg(long, value_name = "N")]
    logprobs: Option<usize>,
}

impl SamplingArguments {
    fn fields(&self) -> SamplingFields {
        SamplingFields {
            n: self.num_completions,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            seed: self.seed,
            stop: self.stop.clone(),
            ignore_eos: Some(self.ignore_eos),
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            logprobs: self.logprobs,
            ..SamplingFields::default()
        }
    }
}

fn stdin(what: &str) -> Result<String> {
    let mut stdin = std::io::stdin();
    if stdin.is_terminal() {
        say!("reading the {what} from the terminal; end it with Ctrl-D");
    }
    let mut bytes = Vec::new();
    stdin.read_to_end(&mut bytes).context("reading stdin")?;
    String::from_utf8(bytes).with_context(|| format!("the {what} on stdin is not UTF-8"))
}

pub fn run(arguments: Arguments) -> Result<u8> {
    let sampling = arguments.sampling.fields();
    if !arguments.json && (sampling.n.is_some_and(|n| n > 1) || sampling.logprobs.is_some()) {
        bail!(Usage("several completions and log-probabilities are shown with --json only".into()));
    }
    let text = arguments.model.open_text()?;
    let body = match (&arguments.chat, &arguments.prompt) {
        (Some(message), _) => {
            let message = if message.is_empty() { stdin("message")? } else { message.clone() };
            let system = arguments.system.iter().map(|text| Message::new("system", text));
            Body::Chat(ChatBody {
                model: None,
                messages: system.chain([Message::new("user", message)]).collect(),
                add_generation_prompt: true,
                template_arguments: Default::default(),
                sampling,
            })
        }
        (None, prompt) => Body::Completions(CompletionsBody {
            model: None,
            prompt: Prompt::Text(match prompt.clone().map_or_else(|| stdin("prompt"), Ok)? {
                empty if empty.is_empty() => bail!(Usage("the prompt is empty".into())),
                text => text,
            }),
            echo: false,
            add_special_tokens: true,
            sampling,
        }),
    };
    let line = BatchLine { line_number: 1, custom_id: "generate".into(), body };
    // Refused before anything is loaded, as far as that can be known.
    line.to_sampling(&text.defaults).map_err(|error| Usage(error.message))?;
    // A request that is refused says so below.
    let lengths = line.to_request(&text.tokenizer, text.template.as_ref(), &text.defaults, usize::MAX);
    let lengths = lengths.map(|request| super::lengths::of_request(&request)).unwrap_or_default();
    let completions = lengths.len() as u64;
    let workload = Workload::of(lengths, Some(completions));
    let prepared = arguments.engine.prepare(&arguments.model, &text, workload)?;
    let vocab = prepared.config().shape.vocab;
    let mut request = line
        .to_request(&text.tokenizer, text.template.as_ref(), &text.defaults, vocab)
        .map_err(|error| anyhow::anyhow!(error.message))?;
    if arguments.sampling.max_tokens.is_none() && text.defaults.max_new_tokens.is_none() {
        request.params.max_tokens = None;
    }
    let mut trace = arguments.trace.open()?;
    let mut engine = load(prepared)?;
    let mut output = None;
    let mut broken: Option<std::io::Error> = None;
    let summary = engine.run(&mut std::iter::once(request), RunOptions::default(), &mut |event| {
        match event {
            Event::Text { text, .. } if !arguments.json => {
                let mut stdout = std::io::stdout().lock();
                if let Err(error) = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
                    broken = Some(error);
                    return ControlFlow::Break(());
                }
            }
            Event::Finished(finished) => output = Some(finished),
            Event::Pass(pass) => trace.pass(&pass),
            _ => {}
        }
        ControlFlow::Continue(())
    })?;
    if let Some(error) = broken {
        return Err(error).context("writing to stdout");
    }
    let output = output.context("the run ended without an answer")?;
    let completions = output.result?;
    if arguments.json {
        let model = arguments.model.served_name();
        let line =
            OutputLine::success(&line, &completions, output.prompt_tokens, &text.tokenizer, &model, now_seconds());
        print_line(serde_json::to_string_pretty(&line.response.context("a success has a response")?.body)?)?;
    } else {
        print_line("")?;
    }
    let seconds = summary.elapsed.as_secs_f64().max(1e-9);
    say!(
        "{} prompt tokens, {} generated in {seconds:.2} s ({:.1} tok/s)",
        output.prompt_tokens,
        summary.generated_tokens,
        summary.generated_tokens as f64 / seconds
    );
    if let Some(comparison) = &summary.comparison {
        say!("{}", comparison.line());
    }
    trace.finish(&super::open::heading(&engine))?;
    Ok(super::OK)
}
