//! Traffic control of interfaces: the ingress qdisc, its filter that redirects, and the exceptions
//! before that. Called by `mirror`, which decides; only the messages are here.
//!
//! Our filters are identified by their priority and their actions' cookie, so that leftovers of a
//! killed sandbox process can be distinguished from other programs' filters.

use std::io;

use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption,
    TcActionType, TcAttribute, TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror,
    TcMirrorActionType, TcOption, TcU32Key, TcU32Selector, TcU32SelectorFlags,
};

use super::Netlink;

/// Cookie in the actions of our filters. At most 16 bytes.
const COOKIE: &[u8] = b"hull mirror";

/// Priority of our filter: a number that others are unlikely to choose ("hu").
const PRIORITY: u16 = 0x6875;

/// Priority of our exceptions from it.
const EXCEPTIONS: u16 = PRIORITY - 1;

/// The qdisc itself is `ffff:`; filters for received packets are attached below this, in both
/// `ingress` and `clsact`.
const RECEIVED: TcHandle = TcHandle {
    major: 0xffff,
    minor: TcHandle::MIN_INGRESS,
};

/// Which filters an interface has for received packets.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Filters {
    /// Our redirecting filter.
    pub ours: bool,
    /// Other programs' filters.
    pub foreign: bool,
}

impl Netlink {
    /// Kind of the qdisc that has the filters for received packets: `ingress` or `clsact`, or none.
    pub(crate) async fn ingress_qdisc(&self, index: u32) -> io::Result<Option<String>> {
        let message = RouteNetlinkMessage::GetQueueDiscipline(about(index));
        // The kernel lists the qdiscs of all interfaces.
        let listed = self.dump(message).await?;
        Ok(listed.into_iter().find_map(|listed| match listed {
            RouteNetlinkMessage::NewQueueDiscipline(qdisc)
                if qdisc.header.index == index as i32
                    && qdisc.header.parent == TcHandle::INGRESS =>
            {
                kind(&qdisc).map(str::to_owned)
            }
            _ => None,
        }))
    }

    /// Adds an `ingress` qdisc; EEXIST if there is one of either kind.
    pub(crate) async fn add_ingress_qdisc(&self, index: u32) -> io::Result<()> {
        let message = RouteNetlinkMessage::NewQueueDiscipline(ingress(index));
        self.request(message, NLM_F_CREATE | NLM_F_EXCL).await
    }

    /// Removes the `ingress` qdisc with all its filters.
    pub(crate) async fn delete_ingress_qdisc(&self, index: u32) -> io::Result<()> {
        let message = RouteNetlinkMessage::DelQueueDiscipline(ingress(index));
        self.request(message, 0).await
    }

    /// Which filters there are for received packets.
    pub(crate) async fn ingress_filters(&self, index: u32) -> io::Result<Filters> {
        let mut message = about(index);
        message.header.parent = RECEIVED;
        let listed = self
            .dump(RouteNetlinkMessage::GetTrafficFilter(message))
            .await?;
        let (mut ours, mut foreign, mut tables) = (false, false, false);
        for listed in listed {
            let RouteNetlinkMessage::NewTrafficFilter(filter) = listed else {
                continue;
            };
            let is_u32 = kind(&filter) == Some(TcFilterU32::KIND);
            let at_our_priority = is_u32 && priority(&filter) == PRIORITY;
            match cookie(&filter) {
                _ if is_u32 && priority(&filter) == EXCEPTIONS => ours = true,
                Some(COOKIE) if at_our_priority => ours = true,
                // The hash table that the kernel creates for filters of a priority.
                None if at_our_priority && !has_selector(&filter) => tables = true,
                _ => foreign = true,
            }
        }
        // A table without a filter of ours is another program's.
        foreign |= tables && !ours;
        Ok(Filters { ours, foreign })
    }

    /// Redirects every packet that `from` receives to `to`, which sends it, for every protocol.
    pub(crate) async fn add_redirect(&self, from: u32, to: u32) -> io::Result<()> {
        let action = send(to, TcMirrorActionType::EgressRedir, TcActionType::Stolen);
        // Without a key everything matches; a key would not match packets too short for it.
        self.add_filter(from, PRIORITY, &[], Some(action)).await
    }

    /// Makes an exception from [`Netlink::add_redirect`]: packets that match all keys go to the
    /// namespace's own stack.
    pub(crate) async fn add_exception(&self, from: u32, keys: &[Key]) -> io::Result<()> {
        self.add_filter(from, EXCEPTIONS, keys, None).await
    }

    /// Like [`Netlink::add_exception`], and `to` sends a copy.
    pub(crate) async fn add_copy(&self, from: u32, to: u32, keys: &[Key]) -> io::Result<()> {
        let action = send(to, TcMirrorActionType::EgressMirror, TcActionType::Pipe);
        self.add_filter(from, EXCEPTIONS, keys, Some(action)).await
    }

    async fn add_filter(
        &self,
        from: u32,
        priority: u16,
        keys: &[Key],
        action: Option<TcAction>,
    ) -> io::Result<()> {
        let mut selector = TcU32Selector::default();
        selector.flags = TcU32SelectorFlags::Terminal;
        selector.nkeys = keys.len() as u8;
        selector.keys = keys.iter().copied().map(TcU32Key::from).collect();
        let mut options = vec![TcOption::U32(TcFilterU32Option::Selector(selector))];
        let action = action.map(|action| TcFilterU32Option::Action(vec![action]));
        options.extend(action.map(TcOption::U32));
        let mut message = our_filter(from, priority);
        message.attributes = vec![
            TcAttribute::Kind(TcFilterU32::KIND.to_owned()),
            TcAttribute::Options(options),
        ];
        let message = RouteNetlinkMessage::NewTrafficFilter(message);
        self.request(message, NLM_F_CREATE | NLM_F_EXCL).await
    }

    /// Removes our filter, and the exceptions from it.
    pub(crate) async fn delete_redirect(&self, from: u32) -> io::Result<()> {
        self.delete_exceptions(from).await?;
        let message = RouteNetlinkMessage::DelTrafficFilter(our_filter(from, PRIORITY));
        match self.request(message, 0).await {
            // A killed process had added only exceptions.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            deleted => deleted,
        }
    }

    /// Removes the exceptions, if there are any.
    pub(crate) async fn delete_exceptions(&self, from: u32) -> io::Result<()> {
        let message = RouteNetlinkMessage::DelTrafficFilter(our_filter(from, EXCEPTIONS));
        match self.request(message, 0).await {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            deleted => deleted,
        }
    }
}

/// Matches four bytes of a packet at `offset` from the start of the frame's payload.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Key {
    pub offset: u8,
    pub mask: u32,
    pub value: u32,
}

impl From<Key> for TcU32Key {
    fn from(from: Key) -> Self {
        let mut key = Self::default();
        (key.mask, key.val) = (from.mask, from.value);
        key.off = from.offset.into();
        key
    }
}

/// The action that sends a packet through `to`.
fn send(to: u32, how: TcMirrorActionType, then: TcActionType) -> TcAction {
    let mut mirror = TcMirror::default();
    mirror.generic.action = then;
    mirror.eaction = how;
    mirror.ifindex = to;
    let parameters = TcActionMirrorOption::Parms(mirror);
    let mut action = TcAction::default();
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.to_owned()),
        TcActionAttribute::Cookie(COOKIE.to_vec()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(parameters)]),
    ];
    action
}

fn about(index: u32) -> TcMessage {
    TcMessage::with_index(index as i32)
}

fn ingress(index: u32) -> TcMessage {
    let mut message = about(index);
    message.header.parent = TcHandle::INGRESS;
    message.header.handle = TcHandle {
        major: 0xffff,
        minor: 0,
    };
    message.attributes = vec![TcAttribute::Kind("ingress".to_owned())];
    message
}

/// Selects all filters of one of our priorities below the qdisc.
fn our_filter(index: u32, priority: u16) -> TcMessage {
    let mut message = about(index);
    message.header.parent = RECEIVED;
    // The protocol is in network byte order.
    let every_protocol = (libc::ETH_P_ALL as u16).to_be();
    message.header.info = u32::from(priority) << 16 | u32::from(every_protocol);
    message
}

fn kind(message: &TcMessage) -> Option<&str> {
    message.attributes.iter().find_map(|attribute| {
        let TcAttribute::Kind(kind) = attribute else {
            return None;
        };
        Some(kind.as_str())
    })
}

fn priority(filter: &TcMessage) -> u16 {
    (filter.header.info >> 16) as u16
}

/// The options of a u32 filter.
fn options(filter: &TcMessage) -> impl Iterator<Item = &TcFilterU32Option> {
    let options = filter.attributes.iter().find_map(|attribute| {
        let TcAttribute::Options(options) = attribute else {
            return None;
        };
        Some(options)
    });
    options.into_iter().flatten().filter_map(|option| {
        let TcOption::U32(option) = option else {
            return None;
        };
        Some(option)
    })
}

fn has_selector(filter: &TcMessage) -> bool {
    options(filter).any(|option| matches!(option, TcFilterU32Option::Selector(_)))
}

/// The cookie of the filter's only action.
fn cookie(filter: &TcMessage) -> Option<&[u8]> {
    let actions = options(filter).find_map(|option| match option {
        TcFilterU32Option::Action(actions) => Some(actions),
        _ => None,
    })?;
    let [action] = actions.as_slice() else {
        return None;
    };
    action.attributes.iter().find_map(|attribute| {
        let TcActionAttribute::Cookie(cookie) = attribute else {
            return None;
        };
        Some(cookie.as_slice())
    })
}
