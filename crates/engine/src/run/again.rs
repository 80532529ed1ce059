//! A container that is there is started: again, or for the first time after `hull create`.

use std::fs::File;

use hull_image::{Image, Reference};
use hull_sandbox::control;
use hull_sandbox::store::{
    CONSOLE_FILE, MESSAGES_FILE, ProcessId, Record, SandboxPath, State, Status,
};
use hull_sandbox::timings::{Timings, now_ns};

use super::{Outcome, Run, SANDBOX_DIGITS, sandbox_digits};
use crate::attach::Attachment;
use crate::config::Config;
use crate::container::{self, Container, Details, Down};
use crate::error::{Error, Result, of_image};
use crate::health;
use crate::names;
use crate::network::Plan;
use crate::supervise;
use crate::unpacker;

/// What there is to do to have a container run.
#[derive(Debug)]
pub enum Attempt<'a> {
    /// Nothing: it runs.
    Running(Box<Container>),
    /// It has to be started.
    Again(Box<Again<'a>>),
}

/// A container that does not run, and that nobody else starts or looks into meanwhile.
#[derive(Debug)]
pub struct Again<'a> {
    run: Run<'a>,
    container: Container,
    /// No person has asked for it.
    by_itself: bool,
    _lock: File,
}

impl<'a> Attempt<'a> {
    /// Finds the container, and waits for others that start it or copy from it.
    ///
    /// # Errors
    /// `NotFound`; `WrongState` when it cannot be started; what was asked for does not make sense
    /// any more.
    pub fn prepare(
        name: &str,
        config: &'a Config,
        began_ns: u64,
        timings: &'a Timings,
    ) -> Result<Self> {
        let paths = config.paths();
        let found = container::find(&paths, name)?;
        let lock = container::lock(&found)?;
        let container =
            container::load(&paths, &found.record.id)?.ok_or_else(|| names::no_such(name))?;
        let details = &container.record.details;
        let wrong = match container.status.state {
            State::Running => return Ok(Self::Running(Box::new(container))),
            State::Paused => Some(("it is paused", "hull unpause lets it go on")),
            State::Creating => Some(("it is being created", "hull rm -f removes it")),
            State::Stopped if details.auto_remove => Some((
                "it was created with --rm and has ended",
                "hull rm removes what is left of it",
            )),
            State::Created | State::Stopped => None,
        };
        if let Some((why, instead)) = wrong {
            let name = &details.name;
            return Err(
                Error::wrong_state(format!("cannot start container {name}: {why}")).hint(instead),
            );
        }
        let Some(options) = details.options.as_deref().cloned() else {
            return Err(Error::unsupported(format_args!(
                "starting container {}: an older hull created it",
                details.name
            ))
            .hint("hull cp copies out of it, hull run starts a new one"));
        };
        options.check(&paths)?;
        let run = Run {
            id: container.record.id.clone(),
            sandbox: sandbox_digits(&container.record.id),
            options,
            config,
            paths,
            began_ns,
            timings,
        };
        Ok(Self::Again(Box::new(Again {
            run,
            container,
            by_itself: false,
            _lock: lock,
        })))
    }
}

/// Starts a container, with the image that it was created from.
///
/// # Errors
/// As [`Again::start`]; a port is taken; the image is damaged.
pub fn start_again(
    again: Again<'_>,
    config: &Config,
    attachment: Option<&Attachment>,
) -> Result<Outcome> {
    let image = unpacker::store(config)?
        .inspect(&again.image()?)
        .map_err(of_image)?;
    let network = again.run().plan()?;
    again.start(network, &image, attachment)
}

impl<'a> Again<'a> {
    /// The same, by no person's wish.
    pub(crate) fn by_itself(self) -> Self {
        Self {
            by_itself: true,
            ..self
        }
    }

    /// What is started.
    pub fn run(&self) -> &Run<'a> {
        &self.run
    }

    /// What is known of it.
    pub fn details(&self) -> &Details {
        &self.container.record.details
    }

    /// The image that it was created from, whatever the name of that means now.
    ///
    /// # Errors
    /// The record is damaged.
    pub fn image(&self) -> Result<Reference> {
        self.details().image_id.parse().map_err(of_image)
    }

    /// Starts it. With an attachment, its streams come with it.
    ///
    /// # Errors
    /// Anything that keeps it from running; then it is as it was before.
    pub fn start(
        mut self,
        network: Plan,
        image: &Image,
        attachment: Option<&Attachment>,
    ) -> Result<Outcome> {
        let begin = now_ns();
        self.leave_the_last_sandbox()?;
        let Self { run, container, .. } = &self;
        let place = run.place(network)?;
        let mut record: Record<Details> = container.record.clone();
        record.creator = ProcessId::own();
        place.describe(&mut record);
        record.details.down = Down::No;
        record.details.restarts = match self.by_itself {
            true => record.details.restarts.saturating_add(1),
            false => 0,
        };
        record.write(&container.directory)?;
        let starting = Status {
            state: State::Creating,
            ..container.status.clone()
        };
        starting.write(&container.directory)?;
        run.timings.step("request", begin);
        let started = run.launch(image, &place, &container.directory, attachment);
        if matches!(started, Ok(Outcome::Started(_))) {
            if let Some(container) = Container::load(container.directory.path())? {
                supervise::ensure(run.config, &container)?;
            }
            return started;
        }
        if let Err(error) = self.undo(&place.sandbox, place.host.is_none()) {
            tracing::warn!("{error}");
        }
        started
    }

    /// Waits for the end of the sandbox that it was in, and removes what is left of that. One that
    /// goes on for other containers is left to them.
    fn leave_the_last_sandbox(&mut self) -> Result<()> {
        let (run, container) = (&mut self.run, &self.container);
        for file in [CONSOLE_FILE, MESSAGES_FILE, health::FILE] {
            container.directory.remove_file(file)?;
        }
        let Some(last) = &container.record.sandbox else {
            return Ok(());
        };
        let of_others = |other: &Container| {
            other.record.id != container.record.id
                && other.record.sandbox.as_ref() == Some(last)
                && other.status.state.is_alive()
        };
        if last.is_alive() && container::list(&run.paths)?.iter().flatten().any(of_others) {
            run.sandbox = names::new_id()?;
            run.sandbox.truncate(SANDBOX_DIGITS);
            return Ok(());
        }
        last.wait_for_end()?;
        last.sweep()?;
        hull_sandbox::undo_network(&container.directory)
    }

    /// Ends what was started of it, and writes down what was known before.
    fn undo(&self, sandbox: &SandboxPath, own: bool) -> Result<()> {
        let Container {
            directory,
            record,
            status,
        } = &self.container;
        if own {
            // Its command has gone, so it ends by itself, unless it has the container already.
            control::remove(sandbox, &record.id)?;
        }
        record.write(directory)?;
        status.write(directory)
    }
}
