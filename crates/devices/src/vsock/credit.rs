//! Credit-based flow control of one connection: two pairs of counters, one per direction.
//!
//! Each side announces, in the header of every packet, the size of its receive buffer (`buf_alloc`)
//! and how many bytes have left that buffer so far (`fwd_cnt`). The sender knows how many bytes it
//! has sent, so what may be sent is `buf_alloc - (sent - fwd_cnt)`. All counters are `u32` and
//! wrap. [`Allowance`] is what the guest allows us, [`Grant`] what we allow the guest;
//! [`super::connection`] is the only user. Nothing here does I/O, and the guest's numbers are only
//! trusted to decide how much may be written into buffers it provides.

/// What the guest allows us to send to it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowance {
    sent: u32,
    buf_alloc: u32,
    fwd_cnt: u32,
}

impl Allowance {
    /// Takes the guest's latest numbers.
    ///
    /// `fwd_cnt` counts only when it lies between the last known one and what was really sent.
    /// Anything else is an older packet that was overtaken (the Linux driver may reorder packets of
    /// two threads), or invalid; both are ignored, which can only make us send less.
    pub fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.buf_alloc = buf_alloc;
        if self.sent.wrapping_sub(fwd_cnt) <= self.in_flight() {
            self.fwd_cnt = fwd_cnt;
        }
    }

    /// Bytes that may be sent now. Zero if the guest has shrunk its buffer below what is in flight.
    pub fn available(&self) -> u32 {
        self.buf_alloc.saturating_sub(self.in_flight())
    }

    /// Accounts for `count` bytes sent, which must have been available.
    pub fn spend(&mut self, count: u32) {
        debug_assert!(
            count <= self.available(),
            "more sent than the guest allowed"
        );
        self.sent = self.sent.wrapping_add(count);
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.fwd_cnt)
    }
}

/// What we allow the guest to send to us, and how much of it is in our buffer.
#[derive(Clone, Copy, Debug)]
pub struct Grant {
    size: u32,
    received: u32,
    forwarded: u32,
    announced: u32,
    /// The guest's own buffer, which also limits what the guest has in flight.
    peer_window: u32,
}

impl Grant {
    /// A grant of `size` bytes, the bound of the receive buffer.
    pub fn new(size: u32) -> Self {
        Self {
            size,
            received: 0,
            forwarded: 0,
            announced: 0,
            peer_window: u32::MAX,
        }
    }

    /// The bound of the receive buffer.
    pub fn size(&self) -> u32 {
        self.size
    }

    /// Accounts for received `count` bytes. False, and nothing is accounted, if the guest had no
    /// credit for them.
    #[must_use]
    pub fn accept(&mut self, count: u32) -> bool {
        if count > self.size - self.held() {
            return false;
        }
        self.received = self.received.wrapping_add(count);
        true
    }

    /// Accounts for `count` bytes that have left the buffer.
    pub fn forward(&mut self, count: u32) {
        debug_assert!(count <= self.held(), "more forwarded than received");
        self.forwarded = self.forwarded.wrapping_add(count);
    }

    /// The `buf_alloc` and `fwd_cnt` for the header of a packet that goes out now.
    pub fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (self.size, self.forwarded)
    }

    /// Sets the size of the guest's own buffer. Linux sends no more than that ahead, whatever its
    /// grant.
    pub fn limit(&mut self, buf_alloc: u32) {
        self.peer_window = buf_alloc;
    }

    /// Whether to send an update even if no other packet goes out: when the guest counts half or
    /// more of what it may send ahead as occupied although it is free. Earlier would cost the guest
    /// an interrupt per packet; later it would wait for ever.
    pub fn worth_announcing(&self) -> bool {
        let unannounced = self.forwarded.wrapping_sub(self.announced);
        unannounced > 0 && unannounced >= self.size.min(self.peer_window).div_ceil(2)
    }

    /// Bytes in the buffer: never more than the size.
    fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn allowance_follows_the_guest() {
        // (bytes sent before, buf_alloc, fwd_cnt, available after)
        let mut allowance = Allowance::default();
        assert_eq!(
            allowance.available(),
            0,
            "nothing before the first packet of the guest"
        );
        for (send, buf_alloc, fwd_cnt, available) in [
            (0, 100, 0, 100),
            (60, 100, 0, 40),
            (40, 100, 0, 0),
            (0, 100, 60, 60),
            (0, 100, 10, 60),  // overtaken packet: older count ignored
            (0, 100, 101, 60), // more than was ever sent: ignored
            (0, 100, u32::MAX, 60),
            (0, 20, 60, 0), // buffer made smaller than what is in flight
            (0, 20, 100, 20),
            (0, u32::MAX, 100, u32::MAX),
        ] {
            allowance.spend(send);
            allowance.update(buf_alloc, fwd_cnt);
            assert_eq!(
                allowance.available(),
                available,
                "{send} {buf_alloc} {fwd_cnt}"
            );
        }
    }

    #[test]
    fn allowance_wraps() {
        let mut allowance = Allowance::default();
        let mut sent = 0u32;
        for _ in 0..10 {
            allowance.update(u32::MAX, sent);
            let step = allowance.available() / 2 + 12345;
            allowance.spend(step);
            sent = sent.wrapping_add(step);
            assert_eq!(allowance.available(), u32::MAX - step);
        }
    }

    #[test]
    fn grant_bounds_the_buffer() {
        let mut grant = Grant::new(100);
        assert!(grant.accept(100));
        assert!(!grant.accept(1));
        assert!(!grant.accept(u32::MAX));
        grant.forward(40);
        assert!(!grant.worth_announcing());
        assert!(!grant.accept(41));
        assert!(grant.accept(40));
        grant.forward(10);
        assert!(grant.worth_announcing());
        assert_eq!(grant.announce(), (100, 50));
        assert!(!grant.worth_announcing());
    }

    #[test]
    fn grant_is_announced_before_the_guest_stalls() {
        // (the guest's own buffer, bytes forwarded, worth announcing)
        for (peer, forwarded, worth) in [
            (u32::MAX, 49, false),
            (u32::MAX, 50, true),
            (60, 29, false),
            (60, 30, true),
            (1, 1, true),
            (0, 1, true),
            (0, 0, false),
        ] {
            let mut grant = Grant::new(100);
            grant.limit(peer);
            assert!(grant.accept(60));
            grant.forward(forwarded);
            assert_eq!(grant.worth_announcing(), worth, "{peer} {forwarded}");
        }
    }

    #[test]
    fn grant_wraps() {
        let mut grant = Grant::new(1 << 31);
        for round in 1..8u32 {
            assert!(grant.accept(1 << 31), "round {round}");
            assert!(!grant.accept(1));
            grant.forward(1 << 31);
            assert_eq!(grant.announce().1, (1u32 << 31).wrapping_mul(round));
        }
    }
}
