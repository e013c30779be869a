//! Router, stream and shard in one thread: draws what happens next, and checks everything after it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::{fmt::Debug, hash::Hash};

use scheduler::*;

use crate::shard::*;

const NUM_EOS: TokenId = 8;
const NUM_STOPS: TokenId = 16;

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Action {
    Arrive,
    Cancel,
    Plan,
    Run,
    Deliver,
    DeliverLate,
    DeliverCorrupt,
    Kill,
    Notice,
    Restart,
    Expire,
    /// The shard computes nothing for a while.
    Stall,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Health {
    Up,
    /// Dead, and the router does not know it.
    Dead,
    /// Dead, and a new one is starting.
    Down,
}

#[derive(Debug, Eq, PartialEq)]
enum End {
    Finished(FinishReason),
    /// The router found a stop string.
    Stopped,
    Cancelled,
}

/// A request as its client sees it.
struct Client {
    request: Request,
    fate: Fate,
    /// What the request generates alone, and why it ends there.
    golden: Vec<TokenId>,
    golden_reason: FinishReason,
    stop: Option<TokenId>,
    emitted: Vec<TokenId>,
    /// Ids emitted, those after a stop string included.
    num_heard: usize,
    end: Option<End>,
    /// No event may follow.
    is_closed: bool,
    num_admissions: u32,
    num_kills: usize,
    /// For each death while it was being computed: how much it had emitted.
    deaths: Vec<usize>,
    suspicion: Suspicion,
}

/// Deaths that are held against a request until it has computed again all that was in flight at each of them.
#[derive(Clone, Copy, Default)]
struct Suspicion {
    num_deaths: usize,
    /// The first position in flight, if there was a death.
    from: Option<usize>,
    /// The length of its log that clears it.
    until: usize,
}

/// What the shard holds of a sequence, as told by the plans and results alone.
struct Shadow {
    row: RowId,
    incarnation: u32,
    namespace: Namespace,
    token_ids: Vec<TokenId>,
    table: Vec<BlockId>,
    num_cached: usize,
    /// Leading blocks that others may hit.
    num_shared: usize,
    /// The slots that committed steps have written.
    kv: Vec<u64>,
    num_open_rows: usize,
    num_open_tokens: usize,
    num_open_samples: usize,
    is_released: bool,
}

#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    pub schedules: usize,
    pub events: usize,
    pub steps: usize,
    pub tokens: usize,
    pub hits: usize,
    pub preemptions: usize,
    pub replays: usize,
    pub deaths: usize,
    pub late: usize,
    pub wasted_rows: usize,
    pub multi_token_rows: usize,
    pub overlapped: usize,
    pub failed_alone: usize,
    pub expired: usize,
    pub withdrawn: usize,
    pub most_excess_rows: usize,
}

impl Counts {
    fn all(&mut self) -> [(&'static str, &mut usize); 15] {
        [
            ("schedules", &mut self.schedules),
            ("events", &mut self.events),
            ("steps", &mut self.steps),
            ("tokens", &mut self.tokens),
            ("hits", &mut self.hits),
            ("preemptions", &mut self.preemptions),
            ("replays", &mut self.replays),
            ("deaths", &mut self.deaths),
            ("late", &mut self.late),
            ("wasted_rows", &mut self.wasted_rows),
            ("multi_token_rows", &mut self.multi_token_rows),
            ("overlapped", &mut self.overlapped),
            ("failed_alone", &mut self.failed_alone),
            ("expired", &mut self.expired),
            ("withdrawn", &mut self.withdrawn),
        ]
    }

    pub fn add(&mut self, other: &Counts) {
        let mut other = *other;
        for ((_, sum), (_, more)) in self.all().into_iter().zip(other.all()) {
            *sum += *more;
        }
        self.most_excess_rows = self.most_excess_rows.max(other.most_excess_rows);
    }

    /// A simulation that never preempts proves nothing about preemption.
    pub fn assert_everything_happened(&mut self) {
        for (name, count) in self.all() {
            assert!(*count > 0, "no {name}");
        }
    }
}

pub struct World {
    rng: Rng,
    weights: Vec<(Action, usize)>,
    limits: Limits,
    scheduler: Scheduler,
    epoch: u64,
    health: Health,
    shard: FakeShard,
    /// The event before which the shard computes nothing.
    stalled_until: usize,
    /// Sent, not yet run; run, not yet delivered; delivered too late.
    stream: VecDeque<StepPlan>,
    replies: VecDeque<StepResult>,
    late: Vec<StepResult>,
    last_committed: Option<StepResult>,
    open: VecDeque<Vec<(SequenceId, Extent)>>,
    clients: BTreeMap<SequenceId, Client>,
    /// Decisions of the router that have yet to reach the scheduler.
    aborts: Vec<(usize, SequenceId)>,
    shadows: BTreeMap<SequenceId, Shadow>,
    /// For each block filled by committed steps of this epoch: its last slot.
    filled: BTreeMap<BlockId, u64>,
    stems: Vec<Vec<TokenId>>,
    /// Blocks of sequences that a row error has ended, and in whose hands they were written.
    tainted: BTreeMap<BlockId, SequenceId>,
    num_random_deaths: usize,
    now: Millis,
    pub counts: Counts,
    pub trace: Option<Vec<String>>,
    /// Of every plan and every event.
    pub digest: u64,
}

impl World {
    pub fn new(seed: u64, trace: Option<Vec<String>>, prepare: &dyn Fn(&mut Scheduler)) -> Self {
        let mut rng = Rng(digest(seed, 99));
        let block_size = [1, 2, 3, 4, 8][rng.below(5)];
        let max_drafts = [0, 0, 1, 3][rng.below(4)];
        let max_step_tokens = 1 + max_drafts + rng.below_one_of([4, 16, 48]);
        let limits = Limits {
            max_step_tokens,
            max_running: 1 + rng.below(10.min(max_step_tokens / (1 + max_drafts))),
            max_open_steps: [1, 2, 2, 4][rng.below(4)],
            max_drafts,
            block_size,
            num_blocks: (1 + rng.below_one_of([8, 24, 120]) / block_size + rng.below(4)) as u32,
            eos: if rng.one_in(2) { (0..NUM_EOS).collect() } else { vec![] },
        };
        let rare = |rng: &mut Rng, most: usize| if rng.one_in(2) { 0 } else { 1 + rng.below(most) };
        let weights = vec![
            (Action::Arrive, 5 + rng.below(30)),
            (Action::Cancel, rare(&mut rng, 8)),
            (Action::Plan, 10 + rng.below(60)),
            (Action::Run, 5 + rng.below(60)),
            (Action::Deliver, 5 + rng.below(60)),
            (Action::DeliverLate, 3),
            (Action::DeliverCorrupt, rare(&mut rng, 2)),
            (Action::Kill, rare(&mut rng, 4)),
            (Action::Notice, 5 + rng.below(20)),
            (Action::Restart, 5 + rng.below(20)),
            (Action::Expire, rare(&mut rng, 6)),
            (Action::Stall, rare(&mut rng, 2)),
        ];
        let stems = (0..3).map(|_| (0..40).map(|_| rng.below(VOCAB as usize) as TokenId).collect()).collect();
        let mut scheduler = Scheduler::new();
        prepare(&mut scheduler);
        assert_eq!(
            scheduler.add(Request { prompt: vec![1], max_new_tokens: 1, ..Request::default() }),
            Err(Rejected::NotReady)
        );
        assert!(scheduler.shards_ready(1, limits.clone()).is_empty());
        Self {
            weights,
            scheduler,
            epoch: 1,
            health: Health::Up,
            shard: FakeShard::new(&limits, 1),
            stalled_until: 0,
            stream: VecDeque::new(),
            replies: VecDeque::new(),
            late: vec![],
            last_committed: None,
            open: VecDeque::new(),
            clients: BTreeMap::new(),
            aborts: vec![],
            shadows: BTreeMap::new(),
            filled: BTreeMap::new(),
            stems,
            tainted: BTreeMap::new(),
            num_random_deaths: 0,
            now: Millis(0),
            counts: Counts { schedules: 1, ..Counts::default() },
            trace,
            digest: 0,
            limits,
            rng,
        }
    }

    /// Lets anything happen, then lets everything come to its end.
    pub fn run(&mut self) {
        for _ in 0..250 {
            let action = self.draw();
            self.on(action);
        }
        let quiet = [Action::Notice, Action::Restart, Action::Plan, Action::Plan, Action::Run, Action::Deliver];
        let mut num_rounds = 0;
        while !self.scheduler.is_idle() || self.health != Health::Up || !self.aborts.is_empty() {
            quiet.iter().for_each(|action| self.on(*action));
            num_rounds += 1;
            assert!(num_rounds < 5_000, "no progress");
        }
        self.check_end();
    }

    fn draw(&mut self) -> Action {
        let total = self.weights.iter().map(|(_, weight)| weight).sum();
        let mut at = self.rng.below(total);
        let drawn = self.weights.iter().find(|(_, weight)| {
            let hit = at < *weight;
            at = at.wrapping_sub(*weight);
            hit
        });
        drawn.expect("below the total").0
    }

    fn on(&mut self, action: Action) {
        self.counts.events += 1;
        self.reach_scheduler();
        match action {
            Action::Arrive => self.arrive(),
            Action::Cancel => self.cancel(),
            Action::Plan => self.plan(),
            Action::Deliver => self.deliver(),
            Action::DeliverLate => self.deliver_late(),
            Action::DeliverCorrupt => self.deliver_corrupt(),
            Action::Notice if self.health == Health::Dead => self.notice(),
            Action::Restart if self.health == Health::Down => self.restart(),
            Action::Expire => self.expire(),
            _ => return self.on_shard(action), // the scheduler does not learn of it
        }
        self.scheduler.check();
        self.check_stats();
    }

    fn on_shard(&mut self, action: Action) {
        match action {
            Action::Run => self.run_shard(),
            Action::Stall => self.stalled_until = self.counts.events + self.rng.below(40),
            Action::Kill if self.health == Health::Up => {
                self.num_random_deaths += 1;
                self.die();
            }
            _ => {}
        }
    }

    /// Adds to the trace and its digest what can be seen of the scheduler from outside.
    fn note(&mut self, what: &(impl Debug + Hash)) {
        let mut fold = Fold(self.digest);
        what.hash(&mut fold);
        self.digest = fold.0;
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{what:?}"));
        }
    }

    // The router.

    fn arrive(&mut self) {
        let rng = &mut self.rng;
        let stem = rng.below(3);
        let mut prompt = self.stems[stem][..rng.below(30)].to_vec();
        prompt.extend((0..rng.below(8)).map(|_| rng.below(VOCAB as usize) as TokenId));
        let mut max_new_tokens = rng.below(16);
        if !rng.one_in(4) {
            // Most are made to fit, so that the tiniest pools have work.
            prompt.truncate(self.limits.num_positions());
            max_new_tokens = max_new_tokens.min(self.limits.num_positions() - prompt.len());
        }
        let namespace = Namespace(rng.below(2) as u64);
        let request = Request {
            prompt,
            max_new_tokens,
            namespace,
            deadline: rng.one_in(3).then(|| Millis(self.now.0 + rng.below(40) as u64)),
            wants_prompt_logprobs: rng.one_in(6),
            ignore_eos: rng.one_in(6),
        };
        let (num_prompt, tokens) = (request.prompt.len(), request.prompt.len() + request.max_new_tokens);
        let mut place = |one_in| rng.one_in(one_in).then(|| rng.below(tokens.max(1)));
        let fate = Fate { namespace, kills_at: place(30), fails_at: place(30) };
        let stop = rng.one_in(3).then(|| NUM_EOS + rng.below((NUM_STOPS - NUM_EOS) as usize) as TokenId);
        match self.scheduler.add(request.clone()) {
            Ok(id) => {
                assert!(num_prompt > 0 && request.max_new_tokens > 0 && tokens <= self.limits.num_positions());
                let (golden, golden_reason) = alone(&request, &self.limits.eos);
                let client = Client {
                    request,
                    fate,
                    golden,
                    golden_reason,
                    stop,
                    emitted: vec![],
                    num_heard: 0,
                    end: None,
                    is_closed: false,
                    num_admissions: 0,
                    num_kills: 0,
                    deaths: vec![],
                    suspicion: Suspicion::default(),
                };
                assert!(self.clients.insert(id, client).is_none());
            }
            Err(Rejected::NotReady) => panic!("there were shards"),
            Err(Rejected::EmptyPrompt) => assert_eq!(num_prompt, 0),
            Err(Rejected::NothingToGenerate) => assert_eq!(request.max_new_tokens, 0),
            Err(Rejected::TooLong { .. }) => assert!(tokens > self.limits.num_positions()),
        }
    }

    fn cancel(&mut self) {
        if self.clients.is_empty() {
            return;
        }
        let id = SequenceId(self.rng.below(self.clients.len()) as u64);
        let client = self.clients.get_mut(&id).expect("ids count up from zero");
        if client.end.is_none() {
            client.end = Some(End::Cancelled);
        }
        client.is_closed = true;
        self.scheduler.abort(id); // often one that has ended already
        self.note(&("abort", id));
    }

    fn expire(&mut self) {
        self.now.0 += self.rng.below(20) as u64;
        let events = self.scheduler.expire(self.now);
        let late =
            |c: &Client| !c.is_closed && c.num_admissions == 0 && c.request.deadline.is_some_and(|d| d < self.now);
        let expected = self.clients.values().filter(|c| late(c)).count();
        assert_eq!(events.len(), expected, "who waited too long ends, and nobody else");
        self.hear(events);
    }

    /// Every count that an operator sees equals what the world knows.
    fn check_stats(&self) {
        let stats = self.scheduler.stats();
        assert_eq!(stats.num_free + stats.num_cached + stats.num_pinned, stats.num_blocks as usize);
        let num_alive = self.clients.values().filter(|c| !c.is_closed).count();
        assert_eq!(stats.num_waiting + stats.num_running, num_alive);
        assert_eq!(stats.num_open_steps, self.open.len());
    }

    fn reach_scheduler(&mut self) {
        let now = self.counts.events;
        for (_, id) in self.aborts.extract_if(.., |(due, _)| *due <= now) {
            self.scheduler.abort(id);
            self.clients.get_mut(&id).expect("it asked").is_closed = true;
            self.scheduler.check();
        }
    }

    fn hear(&mut self, events: Vec<Event>) {
        self.note(&events);
        for event in events {
            match event {
                Event::Token { id, token, .. } => self.hear_token(id, token),
                Event::Finished { id, reason } => self.hear_end(id, reason),
            }
        }
    }

    fn hear_token(&mut self, id: SequenceId, token: TokenId) {
        let client = self.clients.get_mut(&id).expect("a known request");
        assert!(!client.is_closed, "{id:?} goes on after its end");
        client.num_heard += 1;
        if client.request.prompt.len() + client.num_heard >= client.suspicion.until {
            client.suspicion = Suspicion::default();
        }
        if client.end.is_some() {
            return; // stopped; the scheduler does not know it yet
        }
        self.counts.tokens += 1;
        assert_eq!(client.golden.get(client.emitted.len()), Some(&token), "{id:?} after {:?}", client.emitted);
        client.emitted.push(token);
        if client.stop == Some(token) {
            client.end = Some(End::Stopped);
            self.aborts.push((self.counts.events + self.rng.below(7), id));
        }
    }

    fn hear_end(&mut self, id: SequenceId, reason: FinishReason) {
        let client = self.clients.get_mut(&id).expect("a known request");
        assert!(!client.is_closed, "{id:?} ends twice");
        client.is_closed = true;
        match reason {
            FinishReason::RowError => assert!(client.fate.fails_at.is_some()),
            FinishReason::DeadlineExceeded => {
                assert!(client.num_admissions == 0 && client.request.deadline.is_some_and(|d| d < self.now));
                self.counts.expired += 1;
            }
            FinishReason::NoLongerFits => {
                assert!(client.request.prompt.len() + client.request.max_new_tokens > self.limits.num_positions())
            }
            FinishReason::KilledShards => {
                assert!(client.fate.kills_at.is_some() || self.num_random_deaths > 0);
                let most_in_flight = self.limits.max_open_steps * (self.limits.max_drafts + 1);
                let [.., a, b, c] = client.deaths[..] else { panic!("{id:?} fails after {:?}", client.deaths) };
                assert!(client.end.is_some() || b - a < most_in_flight && c - b < most_in_flight, "{id:?} got on");
            }
            FinishReason::Length | FinishReason::EndOfSequence => {
                let is_whole = client.emitted == client.golden && client.golden_reason == reason;
                assert!(client.end.is_some() || is_whole, "{id:?} ends early");
            }
        }
        client.end.get_or_insert(End::Finished(reason));
    }

    // The stream.

    fn plan(&mut self) {
        self.scheduler.set_prompt_tokens(self.rng.below_one_of([4, 40, 4000]));
        let may_wait = self.health == Health::Down || !self.open.is_empty() || self.scheduler.is_idle();
        let Some(plan) = self.scheduler.plan() else {
            assert!(may_wait, "work is queued, the shards are ready, and nothing is planned");
            return;
        };
        self.note(&plan);
        self.counts.steps += 1;
        self.counts.overlapped += usize::from(!self.open.is_empty());
        assert_eq!(plan.epoch, self.epoch);
        assert!(self.open.len() < self.limits.max_open_steps && plan.work.len() <= self.limits.max_running);
        assert!(plan.work.iter().map(|w| w.extent.num_tokens).sum::<usize>() <= self.limits.max_step_tokens);
        plan.admit.iter().for_each(|a| self.shadow_admission(a, plan.release.len()));
        let distinct: BTreeSet<_> = plan.work.iter().map(|w| w.id).collect();
        assert_eq!(distinct.len(), plan.work.len(), "one row for each sequence");
        plan.work.iter().for_each(|w| self.shadow_work(w));
        let num_held = self.shadows.values().filter(|s| !s.is_released).count();
        self.counts.most_excess_rows =
            self.counts.most_excess_rows.max(num_held.saturating_sub(self.limits.max_running));
        for row in &plan.release {
            let holds = |(_, s): &(&SequenceId, &mut Shadow)| s.row == *row && !s.is_released;
            let (id, shadow) = self.shadows.iter_mut().find(holds).expect("a row that is held");
            shadow.is_released = true;
            let is_admitted_again = plan.admit.iter().any(|a| a.id == *id);
            assert!(!is_admitted_again, "{id:?} is admitted by the plan that releases it");
            self.counts.preemptions += usize::from(!self.clients[id].is_closed);
        }
        self.open.push_back(plan.work.iter().map(|w| (w.id, w.extent)).collect());
        let num_running = self.shadows.values().filter(|s| !s.is_released).count();
        assert_eq!(self.scheduler.stats().num_running, num_running);
        self.check_blocks();
        self.check_seniority(&plan);
        self.check_suspects();
        if self.health == Health::Up {
            self.stream.push_back(plan);
        }
    }

    fn shadow_admission(&mut self, a: &Admission, num_releases: usize) {
        self.clients.get_mut(&a.id).expect("a known request").num_admissions += 1;
        let client = &self.clients[&a.id];
        assert!(!client.is_closed, "{:?} is admitted after its end", a.id);
        let is_held = |id| self.shadows.get(id).is_some_and(|s| !s.is_released);
        let is_overtaken = self.clients.range(..a.id).any(|(id, older)| !older.is_closed && !is_held(id));
        assert!(!is_overtaken || client.deaths.len() >= 2, "{:?} is admitted before its elders", a.id);
        let log = client.request.prompt.iter().chain(&client.emitted);
        assert!(client.end.is_some() || log.eq(&a.token_ids), "an admission carries the whole log");
        assert_eq!(a.num_prompt, client.request.prompt.len());
        let num_rows = self.limits.max_running + num_releases.min(self.limits.max_running);
        assert!((a.row.0 as usize) < num_rows, "the tables of the shards are large enough");
        let in_use = || self.shadows.values().filter(|s| !s.is_released).map(|s| s.row);
        assert!(in_use().all(|row| row != a.row), "{:?} is given out while it is held", a.row);
        let num_lower = in_use().filter(|row| *row < a.row).count();
        assert_eq!(num_lower, a.row.0 as usize, "{:?} gets the lowest free row", a.id);
        assert_eq!(a.incarnation, client.num_admissions, "an incarnation counts admissions");
        let may_hide = client.suspicion.from.is_some_and(|from| from < a.num_cached);
        assert!(!may_hide, "{:?} has to compute again what was in flight at a death", a.id);
        let owes_logprobs = client.request.wants_prompt_logprobs && a.token_ids.len() == a.num_prompt;
        assert!(!owes_logprobs || a.num_cached == 0, "{:?} cannot tell what it does not compute", a.id);
        let shadow = Shadow {
            row: a.row,
            incarnation: a.incarnation,
            namespace: client.request.namespace,
            token_ids: a.token_ids.clone(),
            table: vec![],
            num_cached: a.num_cached,
            num_shared: a.num_cached / self.limits.block_size,
            kv: vec![],
            num_open_rows: 0,
            num_open_tokens: 0,
            num_open_samples: 0,
            is_released: false,
        };
        self.counts.hits += a.num_cached / self.limits.block_size;
        if let Some(old) = self.shadows.insert(a.id, shadow) {
            assert!(old.is_released && old.num_open_rows == 0, "{:?} is admitted while the shard holds it", a.id);
            assert!(old.incarnation < a.incarnation, "{:?}", a.id);
            self.counts.replays += 1;
        }
    }

    fn shadow_work(&mut self, row: &Work) {
        let block_size = self.limits.block_size;
        let shadow = self.shadows.get_mut(&row.id).expect("a row of an admitted sequence");
        assert!(!shadow.is_released && !self.clients[&row.id].is_closed, "{:?} has ended", row.id);
        assert_eq!((shadow.row, shadow.incarnation), (row.row, row.incarnation));
        let num_hits = if shadow.table.is_empty() { shadow.num_cached / block_size } else { 0 };
        for (i, block) in row.new_blocks.iter().enumerate() {
            if i >= num_hits {
                self.filled.remove(block);
                self.tainted.remove(block);
                continue;
            }
            assert!(!self.tainted.contains_key(block), "{block:?} was written by a sequence that failed");
            for token in &shadow.token_ids[i * block_size..(i + 1) * block_size] {
                shadow.kv.push(key_value(shadow.kv.last().copied(), shadow.namespace, *token));
            }
            assert_eq!(self.filled.get(block), shadow.kv.last(), "a hit holds what a committed step has computed");
        }
        assert!(row.new_blocks.len() >= num_hits);
        shadow.table.extend(&row.new_blocks);
        let request = &self.clients[&row.id].request;
        let limit = request.prompt.len() + request.max_new_tokens;
        assert!(shadow.token_ids.len() + shadow.num_open_samples < limit, "{:?} is certain to end", row.id);
        shadow.num_open_rows += 1;
        shadow.num_open_tokens += row.extent.num_tokens;
        shadow.num_open_samples += usize::from(row.extent.samples);
        let most = shadow.kv.len() + shadow.num_open_tokens;
        assert!(most <= shadow.table.len() * block_size, "there is room for the longest outcome");
        assert!(most <= limit, "no position is beyond the limit");
    }

    /// A block that an open or later row may write is in the hands of one sequence.
    fn check_blocks(&self) {
        let mut num_holders = vec![0; self.limits.num_blocks as usize];
        let held = || self.shadows.values().filter(|s| !s.is_released || s.num_open_rows > 0);
        held().flat_map(|s| &s.table).for_each(|block| num_holders[block.0 as usize] += 1);
        for shadow in held() {
            for block in &shadow.table[shadow.kv.len() / self.limits.block_size..] {
                assert_eq!(num_holders[block.0 as usize], 1, "{block:?} is writable and shared");
            }
        }
        let stats = self.scheduler.stats();
        assert_eq!(stats.num_pinned, num_holders.iter().filter(|n| **n > 0).count());
        let can_be_hit = self.filled.keys().filter(|block| num_holders[block.0 as usize] == 0);
        assert!(stats.num_cached <= can_be_hit.count(), "cached is what can be hit and nobody holds");
    }

    /// Who runs goes on, or has to wait for blocks; and then sees nobody younger take one.
    fn check_seniority(&self, plan: &StepPlan) {
        let has_row = |id| plan.work.iter().any(|w| w.id == id);
        let waits = |id: SequenceId, s: &Shadow| {
            let request = &self.clients[&id].request;
            let limit = request.prompt.len() + request.max_new_tokens;
            let may_go_on = s.token_ids.len() + s.num_open_samples < limit && s.kv.len() + s.num_open_tokens < limit;
            may_go_on && !s.is_released && !has_row(id)
        };
        for (id, s) in self.shadows.iter().filter(|(id, s)| waits(**id, s)) {
            let num_known = if s.num_open_samples > 0 { 1 } else { s.token_ids.len() - s.kv.len() - s.num_open_tokens };
            let most = s.kv.len() + s.num_open_tokens + num_known + self.limits.max_drafts;
            assert!(most > s.table.len() * self.limits.block_size, "{id:?} could go on and has no row");
        }
        let first_waiting = self.shadows.iter().find(|(id, s)| waits(**id, s)).map(|(id, _)| *id);
        for row in plan.work.iter().filter(|w| first_waiting.is_some_and(|id| id < w.id)) {
            assert!(row.new_blocks.is_empty(), "{:?} takes blocks before {first_waiting:?}", row.id);
        }
    }

    /// Who was there at two deaths has the shards to itself.
    fn check_suspects(&self) {
        let in_flight: BTreeSet<_> = self.open.iter().flatten().map(|(id, _)| *id).collect();
        let num_held = self.shadows.values().filter(|s| !s.is_released).count();
        let has_suspect = in_flight.iter().any(|id| self.clients[id].suspicion.num_deaths >= 2);
        assert!(!has_suspect || in_flight.len() == 1 && num_held <= 1, "a suspect has company");
    }

    fn deliver(&mut self) {
        let Some(result) = self.replies.pop_front() else { return };
        let events = self.scheduler.commit(&result).expect("an honest answer");
        self.check_sources(&result, &events);
        self.shadow_commit(&result);
        self.hear(events);
        self.last_committed = Some(result);
    }

    /// Every id tells where in the result it stands, in order.
    fn check_sources(&self, result: &StepResult, events: &[Event]) {
        let asked = self.open.front().expect("an open step");
        let source = |event: &Event| match *event {
            Event::Token { id, token, work, index } => Some((id, token, work, index)),
            Event::Finished { .. } => None,
        };
        let sources: Vec<_> = events.iter().filter_map(source).collect();
        for &(id, token, work, index) in &sources {
            let tokens = result.rows[work].tokens.as_ref().expect("a row with an error has no ids");
            assert_eq!((asked[work].0, tokens[index]), (id, token));
        }
        assert!(sources.is_sorted_by(|a, b| (a.2, a.3) < (b.2, b.3)), "each once, in order");
    }

    fn shadow_commit(&mut self, result: &StepResult) {
        let asked = self.open.pop_front().expect("an open step");
        for ((id, extent), row) in asked.iter().zip(&result.rows) {
            let shadow = self.shadows.get_mut(id).expect("it had a row");
            shadow.num_open_rows -= 1;
            shadow.num_open_tokens -= extent.num_tokens;
            shadow.num_open_samples -= usize::from(extent.samples);
            self.counts.wasted_rows += usize::from(self.clients[id].is_closed);
            let Ok(tokens) = &row.tokens else {
                // What it was given by others stays good; what it wrote itself does not.
                for block in &shadow.table[shadow.num_cached / self.limits.block_size..] {
                    self.counts.withdrawn += usize::from(self.filled.contains_key(block));
                    self.tainted.insert(*block, *id);
                }
                continue;
            };
            self.counts.multi_token_rows += usize::from(tokens.len() > 1);
            shadow.token_ids.extend(tokens);
            let num_computed = shadow.kv.len() + extent.num_known() + tokens.len().saturating_sub(1);
            for p in shadow.kv.len()..num_computed {
                shadow.kv.push(key_value(shadow.kv.last().copied(), shadow.namespace, shadow.token_ids[p]));
            }
            // A block may be hit once a sample has attended to it.
            let num_full = if extent.samples { shadow.kv.len() / self.limits.block_size } else { 0 };
            for (i, block) in shadow.table.iter().enumerate().take(num_full).skip(shadow.num_shared) {
                self.filled.insert(*block, shadow.kv[(i + 1) * self.limits.block_size - 1]);
            }
            shadow.num_shared = shadow.num_shared.max(num_full);
        }
    }

    fn deliver_late(&mut self) {
        let is_late = |result: &mut StepResult| result.epoch < self.epoch || self.health == Health::Down;
        if let Some(result) = self.late.pop_if(is_late) {
            let before = format!("{:?}", self.scheduler);
            assert_eq!(self.scheduler.commit(&result), Ok(vec![]), "an older epoch");
            assert_eq!(format!("{:?}", self.scheduler), before, "an older epoch changes nothing");
            self.counts.late += 1;
        }
    }

    fn deliver_corrupt(&mut self) {
        let Some(mut result) = self.replies.front().cloned() else { return };
        if result.epoch < self.epoch || self.health == Health::Down {
            return;
        }
        let (kind, extra) = (self.rng.below(10), vec![1; self.limits.max_drafts + 2]);
        let (num_rows, i) = (result.rows.len(), self.rng.below(result.rows.len().max(1)));
        let is_sampled = |row: &RowResult| row.tokens.as_ref().is_ok_and(|tokens| !tokens.is_empty());
        match (kind, result.rows.get_mut(i), &self.last_committed) {
            (0, _, _) => result.epoch += 1,
            (1, _, Some(last)) if last.epoch == self.epoch => result = last.clone(),
            (2, Some(_), _) => drop(result.rows.pop()),
            (3, Some(row), _) => row.tokens = Ok(extra),
            (4, Some(row), _) => row.row.0 += 1000,
            (5, Some(row), _) => row.incarnation += 1,
            (6, Some(row), _) if row.tokens.is_ok() => row.computed += 1,
            (7, Some(row), _) if is_sampled(row) => row.tokens = Ok(vec![]),
            (8, Some(_), _) if num_rows > 1 => result.rows.rotate_left(1),
            _ => result.step += 1,
        }
        let before = format!("{:?}", self.scheduler);
        assert!(self.scheduler.commit(&result).is_err(), "{result:?} is not an answer");
        assert_eq!(format!("{:?}", self.scheduler), before, "nothing of a faulty result is applied");
        if self.health == Health::Up {
            self.num_random_deaths += 1;
            self.die();
        }
        self.notice();
    }

    // The shards.

    fn run_shard(&mut self) {
        if self.counts.events < self.stalled_until {
            return;
        }
        let Some(plan) = self.stream.pop_front() else { return };
        match self.shard.run(&plan, |id| self.clients[&id].fate, &mut self.rng) {
            Ok(result) => self.replies.push_back(result),
            Err(Died(id)) => {
                let client = self.clients.get_mut(&id).expect("a known request");
                client.num_kills += 1;
                assert!(client.num_kills <= 3, "{id:?} kills again and again");
                self.die();
            }
        }
    }

    /// Plans not yet run are lost, and a random part of the results; of these some arrive much later.
    fn die(&mut self) {
        self.note(&"death");
        self.counts.deaths += 1;
        self.health = Health::Dead;
        self.stream.clear();
        let num_sent = self.rng.below(self.replies.len() + 1);
        let unsent = self.replies.split_off(num_sent);
        self.late.extend(unsent.into_iter().filter(|_| self.rng.one_in(2)));
    }

    fn notice(&mut self) {
        let in_flight: BTreeSet<_> =
            self.open.iter().flatten().map(|(id, _)| *id).filter(|id| !self.clients[id].is_closed).collect();
        for id in &in_flight {
            let (client, shadow) = (self.clients.get_mut(id).expect("a known request"), &self.shadows[id]);
            client.deaths.push(client.emitted.len());
            let from = if shadow.is_released { 0 } else { shadow.kv.len() };
            let most_new: usize = self.open.iter().flatten().filter(|(i, _)| i == id).map(|(_, e)| e.max_new()).sum();
            let log_len = client.request.prompt.len() + client.num_heard;
            client.suspicion = Suspicion {
                num_deaths: client.suspicion.num_deaths + 1,
                from: Some(client.suspicion.from.map_or(from, |first| first.min(from))),
                until: client.suspicion.until.max(log_len + most_new.max(1)),
            };
        }
        self.health = Health::Down;
        self.late.extend(self.replies.drain(..));
        self.open.clear();
        self.shadows.clear();
        self.filled.clear();
        self.tainted.clear();
        let events = self.scheduler.lose_shards();
        for event in &events {
            let Event::Finished { id, reason: FinishReason::KilledShards } = event else { panic!("{event:?}") };
            assert_eq!(in_flight, BTreeSet::from([*id]), "who fails ran alone");
            self.counts.failed_alone += 1;
        }
        self.hear(events);
    }

    fn restart(&mut self) {
        if self.rng.one_in(4) {
            self.limits.num_blocks = (self.limits.num_blocks + self.rng.below(5) as u32).saturating_sub(2).max(1);
        }
        self.health = Health::Up;
        self.epoch += 1 + self.rng.below(3) as u64;
        self.shard = FakeShard::new(&self.limits, self.epoch);
        let events = self.scheduler.shards_ready(self.epoch, self.limits.clone());
        self.hear(events);
    }

    fn check_end(&mut self) {
        assert_eq!(self.scheduler.stats().num_pinned, 0, "all blocks came back");
        assert_eq!(self.shard.num_rows(), 0, "the shard holds nothing");
        for (id, client) in &self.clients {
            match client.end.as_ref().unwrap_or_else(|| panic!("{id:?} has no end")) {
                End::Finished(FinishReason::Length | FinishReason::EndOfSequence) => {
                    assert_eq!(client.emitted, client.golden)
                }
                End::Stopped => assert_eq!(client.emitted.last(), client.stop.as_ref()),
                End::Finished(_) | End::Cancelled => {} // each id was compared when it came
            }
        }
    }
}

/// Folds what is hashed into a digest that is the same on every machine of 64 bits.
struct Fold(u64);

impl std::hash::Hasher for Fold {
    fn write(&mut self, bytes: &[u8]) {
        bytes.chunks(8).for_each(|word| {
            let mut le = [0; 8];
            le[..word.len()].copy_from_slice(word);
            self.0 = digest(self.0, u64::from_le_bytes(le));
        });
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// What a request generates when nothing else happens in the world.
fn alone(request: &Request, eos: &[TokenId]) -> (Vec<TokenId>, FinishReason) {
    let mut kv = vec![];
    for token in &request.prompt {
        kv.push(key_value(kv.last().copied(), request.namespace, *token));
    }
    let mut generated = vec![];
    loop {
        let token = next_token(kv.iter().copied());
        generated.push(token);
        if eos.contains(&token) && !request.ignore_eos {
            return (generated, FinishReason::EndOfSequence);
        }
        if generated.len() == request.max_new_tokens {
            return (generated, FinishReason::Length);
        }
        kv.push(key_value(kv.last().copied(), request.namespace, token));
    }
}
