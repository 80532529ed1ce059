//! Calls that change something and have an id: each is executed once, however often the host sends
//! it over connections that break. See "Connections" in `agent.proto`. Called by ttrpc, between it
//! and `service`.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use hull_protocol::{CALL_ID_KEY, MAX_CALL_ID, MAX_CALLS};
use tokio::sync::watch;
use ttrpc::r#async::{MethodHandler, Service, TtrpcContext};
use ttrpc::{Code, Request, Response};

use super::status::{Failure, Result};

/// Methods that change nothing.
const REPEATABLE: [&str; 5] = ["Hello", "Wait", "Events", "Stats", "Processes"];

type Answer = ttrpc::Result<Response>;

/// Makes a service execute the calls of its changing methods once per id.
pub fn once(service: &mut Service) {
    let calls = Arc::new(Calls::default());
    for (name, method) in std::mem::take(&mut service.methods) {
        let method = match REPEATABLE.contains(&name.as_str()) {
            true => method,
            false => Box::new(Once {
                method: method.into(),
                name: name.clone(),
                calls: calls.clone(),
            }),
        };
        service.methods.insert(name, method);
    }
}

/// A method whose calls are executed once per id.
struct Once {
    method: Arc<dyn MethodHandler + Send + Sync>,
    name: String,
    calls: Arc<Calls>,
}

#[async_trait]
impl MethodHandler for Once {
    async fn handler(&self, context: TtrpcContext, request: Request) -> Answer {
        let id = context.metadata.get(CALL_ID_KEY);
        let Some(id) = id.and_then(|values| values.first()).cloned() else {
            return self.method.handler(context, request).await;
        };
        let mut answer = match self.calls.begin(&id, &self.name)? {
            Begun::Known(answer) => answer,
            Begun::New(answer) => {
                let (method, calls) = (self.method.clone(), self.calls.clone());
                // A task of its own: it goes on when the connection ends, and this future with it.
                tokio::spawn(async move {
                    let answer = execute(method.as_ref(), context, request).await;
                    calls.end(&id, answer);
                });
                answer
            }
        };
        match answer.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone().unwrap_or(Err(ttrpc::Error::LocalClosed)),
            // The sender is dropped only after it has sent an answer.
            Err(_closed) => Err(ttrpc::Error::LocalClosed),
        }
    }
}

/// Executes a call with its timeout, which ttrpc enforces only while there is a connection.
async fn execute(
    method: &(dyn MethodHandler + Send + Sync),
    context: TtrpcContext,
    request: Request,
) -> Answer {
    let time = u64::try_from(context.timeout_nano).unwrap_or(0);
    let work = method.handler(context, request);
    if time == 0 {
        return work.await;
    }
    match tokio::time::timeout(Duration::from_nanos(time), work).await {
        Ok(answer) => answer,
        Err(_elapsed) => Err(Failure::new(Code::DEADLINE_EXCEEDED, "timeout").into()),
    }
}

/// The calls in execution, and the last ones that have been answered.
#[derive(Default)]
struct Calls {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    calls: HashMap<String, Call>,
    /// Ids of those that have been answered, in the order in which their answers were sent last.
    answered: VecDeque<String>,
}

struct Call {
    method: String,
    answer: watch::Sender<Option<Answer>>,
}

#[derive(Debug)]
enum Begun {
    /// To be executed by the caller.
    New(watch::Receiver<Option<Answer>>),
    /// Executed by an earlier call.
    Known(watch::Receiver<Option<Answer>>),
}

impl Calls {
    fn begin(&self, id: &str, method: &str) -> Result<Begun> {
        if id.is_empty() || id.len() > MAX_CALL_ID {
            return Err(Failure::invalid(format!(
                "invalid {CALL_ID_KEY}: {} bytes, 1 to {MAX_CALL_ID} are allowed",
                id.len()
            )));
        }
        let mut table = self.lock();
        let Table { calls, answered } = &mut *table;
        let Some(call) = calls.get(id) else {
            let (sender, answer) = watch::channel(None);
            let call = Call {
                method: method.to_owned(),
                answer: sender,
            };
            calls.insert(id.to_owned(), call);
            return Ok(Begun::New(answer));
        };
        if call.method != method {
            return Err(Failure::invalid(format!(
                "{CALL_ID_KEY} {id:?} of {method} is that of a {}",
                call.method
            )));
        }
        // Its answer is sent now, after all others.
        if let Some(place) = answered.iter().position(|answered| answered == id)
            && let Some(id) = answered.remove(place)
        {
            answered.push_back(id);
        }
        Ok(Begun::Known(call.answer.subscribe()))
    }

    fn end(&self, id: &str, answer: Answer) {
        let mut table = self.lock();
        if let Some(call) = table.calls.get(id) {
            call.answer.send_replace(Some(answer));
            table.answered.push_back(id.to_owned());
        }
        while table.answered.len() > MAX_CALLS
            && let Some(oldest) = table.answered.pop_front()
        {
            table.calls.remove(&oldest);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while the lock is held; and a panic ends the machine anyway.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn answer(text: &[u8]) -> Answer {
        let mut response = Response::new();
        response.payload = text.to_vec();
        Ok(response)
    }

    fn payload(answer: &watch::Receiver<Option<Answer>>) -> Option<Vec<u8>> {
        let answer = answer.borrow();
        Some(answer.as_ref()?.as_ref().unwrap().payload.clone())
    }

    #[test]
    fn a_repeated_call_gets_the_answer_of_the_first() {
        let calls = Calls::default();
        let Begun::New(first) = calls.begin("a/1", "Exec").unwrap() else {
            panic!("it is new");
        };
        let Begun::Known(second) = calls.begin("a/1", "Exec").unwrap() else {
            panic!("it runs");
        };
        assert_eq!(payload(&second), None);
        calls.end("a/1", answer(b"x"));
        let Begun::Known(third) = calls.begin("a/1", "Exec").unwrap() else {
            panic!("it is answered");
        };
        for answer in [first, second, third] {
            assert_eq!(payload(&answer), Some(b"x".to_vec()));
        }
    }

    #[test]
    fn an_id_belongs_to_one_method() {
        let calls = Calls::default();
        calls.begin("a", "Exec").unwrap();
        let refused = calls.begin("a", "Signal").unwrap_err();
        assert_eq!(refused.code, Code::INVALID_ARGUMENT);
        assert!(calls.begin("", "Exec").is_err());
        assert!(calls.begin(&"x".repeat(MAX_CALL_ID + 1), "Exec").is_err());
    }

    #[test]
    fn the_answers_sent_last_are_kept() {
        let calls = Calls::default();
        let running = calls.begin("running", "Exec").unwrap();
        for n in 0..MAX_CALLS {
            calls.begin(&n.to_string(), "Exec").unwrap();
            calls.end(&n.to_string(), answer(b"x"));
        }
        // Sent again, it becomes the newest.
        assert!(matches!(calls.begin("0", "Exec").unwrap(), Begun::Known(_)));
        for n in MAX_CALLS..2 * MAX_CALLS - 1 {
            calls.begin(&n.to_string(), "Exec").unwrap();
            calls.end(&n.to_string(), answer(b"x"));
        }
        let known = |id: &str| matches!(calls.begin(id, "Exec").unwrap(), Begun::Known(_));
        assert!(known("0") && known("running"));
        assert!(!known("1"));
        assert!(matches!(running, Begun::New(_)));
        assert!(calls.lock().calls.len() <= MAX_CALLS + 2);
    }
}
