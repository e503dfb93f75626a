//! Every batch has a request that fails; it alone may.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use clap::Args;
use plumb_client::{Client, Code, Error, v1};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tokio::task::JoinSet;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::checkpoint;
use crate::context::{Cast, Context, Experiment};
use crate::dialogues::{RESPONSES, dialogues};
use crate::expected::{Judge, PM};
use crate::load::{BATCH, Call, End, Kind, Sink, Tally, check_score};
use crate::options::Common;
use crate::report::Measure;
use crate::server::{Launch, Server};
use crate::surface::{self, Faults};

/// Callers: of single poisoned items, of batches of which one item is poisoned, of sound items.
const CALLERS: [usize; 3] = [2, 2, 8];

/// Options of the experiment.
#[derive(Args)]
pub(crate) struct Poison {
    #[command(flatten)]
    common: Common,
    /// Requests for each kind of poison [quick: 120].
    #[arg(long, default_value_t = 10_000, value_name = "N")]
    requests: usize,
}

/// What the poison does.
const KINDS: [(&str, Option<&str>); 3] = [
    ("a reward that is not a number", None),
    ("a kernel that fails", Some("kernel-error")),
    ("a kernel that panics", Some("kernel-panic")),
];

impl Poison {
    fn requests(&self) -> usize {
        self.common.or_quick(self.requests, 120)
    }
}

impl Experiment for Poison {
    const NAME: &'static str = "poison";
    const TITLE: &'static str = "One poisoned request in every batch";
    const FAULTY: bool = true;

    fn common(&self) -> &Common {
        &self.common
    }

    fn what(&self) -> String {
        let [single, batch, sound] = CALLERS;
        format!(
            "A token that no dialogue holds is the poison: its embedding is NaN, or the kernels of a server with faults on \
             demand fail or panic on it. {} requests for each, by {single} callers of Score with a poisoned item, {batch} \
             with {BATCH} items one of which is poisoned, {sound} with a sound one, all at once, so that the engine's \
             batches hold both. A poisoned item has to fail with INTERNAL; every other one is compared bit for bit with \
             its score on a server that sees no poison.",
            self.requests()
        )
    }

    async fn run(&self, context: &Context) -> Result<Vec<Measure>> {
        let (token, poisoned) = brew(context).await?;
        let sound = context.folder().join("sound");
        checkpoint::variant(&context.common.preference_checkpoint(), &sound, 0)?;
        let mut measures = Vec::new();
        for (name, fault) in KINDS {
            let faults = Faults::in_folder(context.folder())?;
            let (checkpoint, launch) = match fault {
                None => (&poisoned, context.launch()),
                Some(_) => (&sound, context.launch_faulty(&faults)?),
            };
            let cast = context.cast_of(vec![checkpoint.clone()], Vec::new()).await?;
            cast.judge.begins(PM, 1, 0);
            let launch = launch.model(PM, checkpoint).flags("--kv-cache-mib 64").flags(surface::ROOMY);
            let seen = self.feed(context, &cast, launch, fault.map(|fault| (fault, &faults)), token).await?;
            measures.extend(seen.measures(name));
        }
        Ok(measures)
    }
}

/// Chooses the poison, and makes a checkpoint of which its embedding is NaN.
async fn brew(context: &Context) -> Result<(u32, PathBuf)> {
    let checkpoint = context.common.preference_checkpoint();
    let texts = dialogues(&context.common.data()?, context.common.dialogues(), context.seed)?;
    let server = context.launch().model(PM, &checkpoint).flags("--kv-cache-mib 16").start(context.folder()).await?;
    let client = server.client()?;
    let mut used = BTreeSet::new();
    for dialogue in &texts {
        for response in 0..RESPONSES {
            used.extend(ids(&client, dialogue.with(response)).await?);
        }
    }
    let details = client.get_model(v1::ModelSpec::default()).await?.details.context("no details of the model")?;
    let token = (0..details.vocab_size).rev().find(|id| !used.contains(id)).context("all tokens are used")?;
    let poisoned = context.folder().join("poisoned");
    checkpoint::copy(&checkpoint, &poisoned)?;
    checkpoint::poison(&poisoned, token)?;
    Ok((token, poisoned))
}

async fn ids(client: &Client, input: v1::Input) -> Result<Vec<u32>> {
    let request = v1::RenderRequest { input: Some(input), ..Default::default() };
    Ok(client.render(request).await?.token_ids)
}

/// What became of the requests.
#[derive(Default)]
struct Seen {
    requests: AtomicUsize,
    poisoned: AtomicUsize,
    poisoned_not_internal: AtomicUsize,
    sound: AtomicUsize,
    sound_failed: AtomicUsize,
    sound_wrong: AtomicUsize,
    batches: AtomicUsize,
    not_serving: AtomicUsize,
    /// Calls that ended as they should not have.
    astray: Mutex<Tally>,
}

fn count(counter: &AtomicUsize) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Poison {
    async fn feed(
        &self,
        context: &Context,
        cast: &Cast,
        launch: Launch,
        fault: Option<(&str, &Faults)>,
        token: u32,
    ) -> Result<Seen> {
        let server = launch.start(context.folder()).await?;
        if let Some((fault, faults)) = fault {
            faults.ask(&format!("{fault} {token}"))?;
        }
        let seen = Arc::new(Seen::default());
        let batches = batches(&server).await?;
        context.begin(self.requests() as u64, "requests");
        let mut callers = JoinSet::new();
        for (role, of_role) in [Role::Poisoned, Role::Batch, Role::Sound].into_iter().zip(CALLERS) {
            for i in 0..of_role {
                let rng = ChaCha8Rng::seed_from_u64(context.seed << 16 | (role as u64) << 8 | i as u64);
                let judge = Arc::clone(&cast.judge);
                let caller = Caller { client: server.client()?, judge, seen: Arc::clone(&seen), token, rng };
                callers.spawn(caller.run(role, self.requests()));
            }
        }
        while let Some(caller) = callers.join_next().await {
            caller??;
        }
        seen.batches.store(self::batches(&server).await? - batches, Ordering::Relaxed);
        let serving = server.client()?.health("").await.is_ok_and(|status| status == ServingStatus::Serving);
        seen.not_serving.store(usize::from(!serving), Ordering::Relaxed);
        context.show(&seen.astray.lock().unwrap_or_else(PoisonError::into_inner));
        Arc::into_inner(seen).context("a caller goes on")
    }
}

async fn batches(server: &Server) -> Result<usize> {
    Ok(server.metrics().await?.value(surface::BATCHES, &[]) as usize)
}

#[derive(Clone, Copy)]
enum Role {
    Poisoned,
    Batch,
    Sound,
}

struct Caller {
    client: Client,
    judge: Arc<Judge>,
    seen: Arc<Seen>,
    token: u32,
    rng: ChaCha8Rng,
}

impl Caller {
    async fn run(mut self, role: Role, requests: usize) -> Result<()> {
        while self.seen.requests.fetch_add(1, Ordering::Relaxed) < requests {
            let items = if matches!(role, Role::Batch) { BATCH } else { 1 };
            let poisoned = match role {
                Role::Poisoned => Some(0),
                Role::Batch => Some(self.rng.random_range(0..BATCH)),
                Role::Sound => None,
            };
            self.request(items, poisoned).await?;
        }
        Ok(())
    }

    /// A call with so many items, of which one may be poisoned.
    async fn request(&mut self, items: usize, poisoned: Option<usize>) -> Result<()> {
        let count_of = self.judge.expected().dialogues.len();
        let asked: Vec<(usize, usize)> =
            (0..items).map(|_| (self.rng.random_range(0..count_of), self.rng.random_range(0..RESPONSES))).collect();
        let mut inputs = Vec::new();
        for (i, &(dialogue, response)) in asked.iter().enumerate() {
            let input = self.judge.expected().dialogues[dialogue].with(response);
            inputs.push(if poisoned == Some(i) { self.poisoned(dialogue).await? } else { input });
        }
        let began = Instant::now();
        let answer = self.client.score(v1::ScoreRequest { items: inputs, ..Default::default() }).await;
        for (i, &item) in asked.iter().enumerate() {
            if poisoned == Some(i) {
                self.count_poisoned(&answer, i);
            } else {
                self.count_sound(&answer, began, i, item);
            }
        }
        // The only item's failure is its call's.
        if let Err(error) = answer
            && !(items == 1 && poisoned.is_some() && error.code() == Code::Internal)
        {
            let kind = if items == 1 { Kind::Single } else { Kind::Batch };
            self.seen.astray.take(Call { kind, began, ended: Instant::now(), end: error.into() });
        }
        Ok(())
    }

    /// The tokens of a dialogue's prompt with the poison somewhere.
    async fn poisoned(&mut self, dialogue: usize) -> Result<v1::Input> {
        let mut ids = ids(&self.client, self.judge.expected().dialogues[dialogue].prompt()).await?;
        let at = self.rng.random_range(1..=ids.len());
        ids.insert(at, self.token);
        Ok(v1::Input { input: Some(v1::input::Input::TokenIds(v1::TokenIds { ids, response_start: None })) })
    }

    fn count_poisoned(&self, answer: &Result<v1::ScoreResponse, Error>, item: usize) {
        count(&self.seen.poisoned);
        let code = match answer {
            Ok(answer) => plumb_client::score(&answer.results[item]).err().map(|failure| failure.code),
            Err(error) => Some(error.code()),
        };
        if code != Some(Code::Internal) {
            count(&self.seen.poisoned_not_internal);
        }
    }

    fn count_sound(
        &self,
        answer: &Result<v1::ScoreResponse, Error>,
        began: Instant,
        index: usize,
        item: (usize, usize),
    ) {
        count(&self.seen.sound);
        let Ok(answer) = answer else { return count(&self.seen.sound_failed) };
        let alone = v1::ScoreResponse { results: vec![answer.results[index].clone()], ..answer.clone() };
        match check_score(&alone, &self.judge, began, &[item]) {
            End::Right => {}
            End::Wrong(_) => count(&self.seen.sound_wrong),
            End::Failed { .. } => count(&self.seen.sound_failed),
        }
    }
}

impl Seen {
    fn measures(&self, name: &str) -> Vec<Measure> {
        let named = |what: &str| format!("{name}: {what}");
        let get = |counter: &AtomicUsize| counter.load(Ordering::Relaxed);
        let per_batch = get(&self.poisoned) as f64 / get(&self.batches).max(1) as f64;
        vec![
            Measure::never(named("sound items that failed"), get(&self.sound_failed)),
            Measure::never(named("sound items with a wrong score"), get(&self.sound_wrong)),
            Measure::never(named("poisoned items that did not fail with INTERNAL"), get(&self.poisoned_not_internal)),
            Measure::never(named("servers that no longer served"), get(&self.not_serving)),
            Measure::new(named("sound items"), get(&self.sound) as f64, ""),
            Measure::new(named("poisoned items"), get(&self.poisoned) as f64, ""),
            Measure::new(named("poisoned items over batches, those run to find them included"), per_batch, ""),
        ]
    }
}
