//! `hull login` and `hull logout`: accounts at registries, kept where Docker keeps them.

use std::io::{BufRead, IsTerminal, Read, Write};
use std::os::fd::AsFd;

use hull_engine::error::of_image;
use hull_image::{Account, StoredIn};
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::error::{Context, Error, Result};
use crate::output;

/// Longest password that is read, bytes.
const PASSWORD: usize = 64 << 10;

/// Arguments of `login`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// User name; asked for on a terminal when absent
    #[arg(short, long, value_name = "USER")]
    username: Option<String>,
    /// Password or access token; other users of this host can see it
    #[arg(
        short,
        long,
        value_name = "PASSWORD",
        conflicts_with = "password_stdin"
    )]
    password: Option<String>,
    /// Read the password from standard input
    #[arg(long)]
    password_stdin: bool,
    /// Host, and port, of the registry; Docker Hub when absent
    registry: Option<String>,
}

/// Arguments of `logout`.
#[derive(Debug, clap::Args)]
pub struct LogoutArgs {
    /// Host, and port, of the registry; Docker Hub when absent
    registry: Option<String>,
}

/// Checks a user name and a password with a registry, and stores them.
pub fn execute(args: Args) -> Result<u8> {
    let account = Account::docker(args.registry.as_deref()).map_err(of_image)?;
    if args.password_stdin && args.username.is_none() {
        return Err(Error::invalid("--password-stdin needs --username")
            .hint("hull login -u USER --password-stdin <FILE"));
    }
    let stored = match args.username.is_none() && args.password.is_none() {
        true => account.stored().map_err(of_image)?,
        false => None,
    };
    if let Some((user, password)) = &stored {
        output::note("Authenticating with existing credentials...");
        match account.check(user, password) {
            Ok(()) => return succeeded(),
            Err(error) => output::note(format!("Login did not succeed, error: {error}")),
        }
    }
    let before = stored.map(|(user, _)| user);
    let user = match args.username {
        Some(user) => user,
        None => ask_user(account.registry(), before)?,
    };
    let password = match args.password {
        Some(password) => {
            output::note("WARNING: --password can be seen by others; use --password-stdin");
            password
        }
        None if args.password_stdin => password_from_stdin()?,
        None => ask_password()?,
    };
    if user.is_empty() || password.is_empty() {
        return Err(Error::invalid("a user name and a password are needed"));
    }
    account.check(&user, &password).map_err(of_image)?;
    if let StoredIn::File(path) = account.store(&user, &password).map_err(of_image)? {
        output::note(format!(
            "WARNING: the password is stored unencrypted in {}; a credential helper would keep it \
             safer",
            path.display()
        ));
    }
    succeeded()
}

fn succeeded() -> Result<u8> {
    output::print("Login Succeeded\n").map(|()| 0)
}

/// Removes what is stored for a registry.
pub fn logout(args: LogoutArgs) -> Result<u8> {
    let account = Account::docker(args.registry.as_deref()).map_err(of_image)?;
    let registry = account.registry();
    output::print(match account.forget().map_err(of_image)? {
        true => format!("Removing login credentials for {registry}\n"),
        false => format!("Not logged in to {registry}\n"),
    })?;
    Ok(0)
}

fn need_terminal() -> Result<()> {
    match std::io::stdin().is_terminal() {
        true => Ok(()),
        false => Err(Error::invalid(
            "cannot ask for a user name and a password: standard input is no terminal",
        )
        .hint("hull login -u USER --password-stdin [REGISTRY] <FILE")),
    }
}

fn prompt(text: &str) -> Result<()> {
    let mut stderr = std::io::stderr().lock();
    stderr
        .write_all(text.as_bytes())
        .and_then(|()| stderr.flush())
        .context(|| "ask for the user name and the password")
}

fn ask_user(registry: &str, before: Option<String>) -> Result<String> {
    let default = before
        .as_ref()
        .map_or(String::new(), |before| format!(" ({before})"));
    need_terminal()?;
    prompt(&format!("Username for {registry}{default}: "))?;
    let mut line = String::new();
    std::io::stdin()
        .lock()
        .read_line(&mut line)
        .context(|| "read the user name")?;
    match (line.trim(), before) {
        ("", Some(before)) => Ok(before),
        (user, _) => Ok(user.to_owned()),
    }
}

fn password_from_stdin() -> Result<String> {
    let mut password = String::new();
    std::io::stdin()
        .lock()
        .take(PASSWORD as u64)
        .read_to_string(&mut password)
        .context(|| "read the password")?;
    Ok(password.trim_end_matches(['\r', '\n']).to_owned())
}

/// A terminal that shows nothing of what is typed, until this is dropped.
struct Hidden(Termios);

impl Hidden {
    fn new() -> Result<Hidden> {
        let stdin = std::io::stdin();
        let before = tcgetattr(&stdin).context(|| "read the terminal's attributes")?;
        let mut hidden = before.clone();
        // Keys that end a process are bytes here: otherwise the terminal would stay like this.
        hidden.local_modes -= LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
        tcsetattr(&stdin, OptionalActions::Flush, &hidden)
            .context(|| "set the terminal's attributes")?;
        Ok(Hidden(before))
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        // There is nothing else to do if the terminal is gone.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.0);
    }
}

/// Asks for a password on the terminal.
fn ask_password() -> Result<String> {
    const INTERRUPT: u8 = 3;
    const END: u8 = 4;
    const ERASE_LINE: u8 = 21;
    need_terminal()?;
    // First, so that nothing is shown of what is typed at once.
    let hidden = Hidden::new()?;
    prompt("Password: ")?;
    let mut password = Vec::new();
    loop {
        let mut byte = [0];
        let stdin = std::io::stdin();
        let read = rustix::io::retry_on_intr(|| rustix::io::read(stdin.as_fd(), &mut byte[..]));
        let read = read.context(|| "read the password")?;
        match byte[0] {
            _ if read == 0 => break,
            b'\n' | b'\r' | END => break,
            INTERRUPT => {
                drop(hidden);
                output::note("");
                // The status that a shell reports after SIGINT.
                std::process::exit(130);
            }
            8 | 127 => drop(password.pop()),
            ERASE_LINE => password.clear(),
            byte if password.len() < PASSWORD => password.push(byte),
            _ => {}
        }
    }
    drop(hidden);
    output::note("");
    String::from_utf8(password).map_err(|_| Error::invalid("the password is no UTF-8"))
}
