//! The commands of a client: RFC 5321, section 4.1, with the parameters of SIZE (RFC 1870) and
//! 8BITMIME (RFC 6152).

use super::answer::Answer;

/// The maximum lengths of the local part and the domain of an address, in octets (RFC 5321, section
/// 4.5.3.1).
const MAX_LOCAL_PART: usize = 64;
const MAX_DOMAIN: usize = 255;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Command {
    Hello {
        client: String,
        extended: bool,
    },
    StartTls,
    /// The sender is empty in a mail that reports a failure.
    Mail {
        from: String,
        size: Option<u64>,
    },
    Recipient(String),
    Data,
    Reset,
    Verify,
    Help,
    Noop,
    Quit,
}

impl Command {
    /// Parses a line without its ending.
    ///
    /// # Errors
    ///
    /// Returns the answer to a line that is not a valid command.
    pub(crate) fn parse(line: &[u8]) -> Result<Self, Answer> {
        // SMTPUTF8 is not offered, so a command is ASCII. Only printable characters are accepted,
        // so parts of a command can be repeated in an answer and written into a header.
        let line = std::str::from_utf8(line)
            .ok()
            .filter(|line| line.bytes().all(|byte| (b' '..=b'~').contains(&byte)))
            .ok_or_else(|| Answer::new(500, "Commands are printable ASCII"))?
            .trim_end();
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let alone = |command| match rest {
            "" => Ok(command),
            _ => Err(Answer::new(501, "It takes no parameter")),
        };
        match verb.to_ascii_uppercase().as_str() {
            "EHLO" => hello(rest, true),
            "HELO" => hello(rest, false),
            "STARTTLS" => alone(Self::StartTls),
            "MAIL" => mail(rest),
            "RCPT" => recipient(rest),
            "DATA" => alone(Self::Data),
            "RSET" => alone(Self::Reset),
            "QUIT" => alone(Self::Quit),
            "VRFY" if rest.is_empty() => Err(Answer::new(501, "VRFY whom?")),
            "VRFY" => Ok(Self::Verify),
            "HELP" => Ok(Self::Help),
            "NOOP" => Ok(Self::Noop),
            "EXPN" => Err(Answer::new(502, "Not implemented")),
            _ => Err(Answer::new(500, "Unknown command")),
        }
    }
}

fn hello(client: &str, extended: bool) -> Result<Command, Answer> {
    if client.is_empty() || client.len() > MAX_DOMAIN || client.contains(' ') {
        return Err(Answer::new(501, "Say who you are: a domain"));
    }
    Ok(Command::Hello {
        client: client.to_owned(),
        extended,
    })
}

fn mail(rest: &str) -> Result<Command, Answer> {
    let (from, parameters) = path(rest, "FROM:").ok_or_else(|| syntax("MAIL FROM:<address>"))?;
    let mut size = None;
    for parameter in parameters.split_ascii_whitespace() {
        let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match name.to_ascii_uppercase().as_str() {
            // RFC 1870 allows 20 digits. A number that does not fit into a `u64` is too large in
            // any case.
            "SIZE" if is_number(value) => size = Some(value.parse().unwrap_or(u64::MAX)),
            // Bytes are stored unchanged, so both values mean the same.
            "BODY"
                if value.eq_ignore_ascii_case("7BIT") || value.eq_ignore_ascii_case("8BITMIME") => {
            }
            "SIZE" | "BODY" => return Err(Answer::new(501, "That value is not one")),
            _ => return Err(Answer::new(555, "Unknown parameter")),
        }
    }
    Ok(Command::Mail { from, size })
}

fn is_number(value: &str) -> bool {
    (1..=20).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_digit())
}

fn recipient(rest: &str) -> Result<Command, Answer> {
    let (to, parameters) = path(rest, "TO:").ok_or_else(|| syntax("RCPT TO:<address>"))?;
    if to.is_empty() {
        return Err(syntax("RCPT TO:<address>"));
    }
    if !parameters.trim().is_empty() {
        return Err(Answer::new(555, "Unknown parameter"));
    }
    Ok(Command::Recipient(to))
}

fn syntax(right: &str) -> Answer {
    Answer::new(501, format!("Syntax: {right}"))
}

/// Splits `keyword<address> parameters` into the address and the parameters.
///
/// A space after the colon is wrong, but too common to be refused.
fn path<'a>(text: &'a str, keyword: &str) -> Option<(String, &'a str)> {
    let (found, text) = text.split_at_checked(keyword.len())?;
    if !found.eq_ignore_ascii_case(keyword) {
        return None;
    }
    let text = text.trim_start().strip_prefix('<')?;
    let (address, rest) = text.split_at(end_of_path(text)?);
    let rest = &rest[1..];
    if !rest.is_empty() && !rest.starts_with(' ') {
        return None;
    }
    // A route through other servers is accepted and ignored (RFC 5321, appendix C).
    let address = match address.strip_prefix('@') {
        Some(routed) => routed.split_once(':')?.1,
        None => address,
    };
    is_address(address).then(|| (address.to_owned(), rest))
}

/// Returns the index of the first `>` outside quotes.
fn end_of_path(text: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if quoted => escaped = true,
            b'"' => quoted = !quoted,
            b'>' if !quoted => return Some(at),
            _ => {}
        }
    }
    None
}

/// Returns whether `address` is empty, the local postmaster, or `local-part@domain`.
fn is_address(address: &str) -> bool {
    if address.is_empty() || address.eq_ignore_ascii_case("postmaster") {
        return true;
    }
    let Some((local, domain)) = address.rsplit_once('@') else {
        return false;
    };
    let quoted = local.len() > 2 && local.starts_with('"') && local.ends_with('"');
    let plain = |text: &str| !text.contains([' ', '<', '>', '"', '(', ')', ',', ';', '\\']);
    (1..=MAX_LOCAL_PART).contains(&local.len())
        && (1..=MAX_DOMAIN).contains(&domain.len())
        && (quoted || (plain(local) && !local.contains(['@', ':'])))
        && plain(domain)
}
