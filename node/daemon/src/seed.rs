//! The seed on disk: plain words that only their owner can read, or an age file that a passphrase opens.
//!
//! A passphrase comes from where `wallet.passphrase` says, else from the terminal. It is never an argument of a command
//! line, never logged, and wiped from memory after its use.
//!
//! | changing it | a crash right after means |
//! |---|---|
//! | the new file is written beside, synced | the old seed stands, a `seed.new` lies beside it and is written over next time |
//! | it takes the old one's name, synced | the new seed stands; plain words may still be in free blocks |
//! | the old file's blocks are written over, by the handle that is still open | nothing |

use crate::config::{Config, Secret};
use crate::failure::HintExt;
use anyhow::{Context, bail, ensure};
use rand::RngCore;
use satgrid_wallet::keys::Phrase;
use satgrid_wallet::sealed::{self, OpenError, RANDOM_BYTES, WORK};
use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use zeroize::Zeroizing;

/// Shorter ones are taken, with a word of warning: whoever has the file can try a few passphrases a second.
const SHORT_PASSPHRASE: usize = 12;

/// The work of tests.
const QUICK: u8 = 8;

/// What was read once and cannot be read again: a descriptor's, or a person's. A node that starts anew takes it along.
static TYPED: OnceLock<Zeroizing<String>> = OnceLock::new();

/// How the seed lies on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kept {
    Plain,
    /// As an age file.
    Sealed,
}

/// The words, and how they were kept.
pub(crate) fn read(config: &Config) -> anyhow::Result<(Phrase, Kept)> {
    read_from(&config.wallet.seed, config.wallet.passphrase.as_ref())
}

/// The words in `seed`; where those are encrypted, with the passphrase in `place`, or the one that is typed.
pub(crate) fn read_from(seed: &Secret, place: Option<&Secret>) -> anyhow::Result<(Phrase, Kept)> {
    let text = seed.read().hint("`satgrid init` makes one; only its owner may read it (chmod 600)")?;
    let text = Zeroizing::new(text);
    if !sealed::is_sealed(&text) {
        let phrase = Phrase::parse(&text).context("the seed's words are not right")?;
        return Ok((phrase, Kept::Plain));
    }
    let words = open(seed, &text, &passphrase(place)?)?;
    Ok((Phrase::parse(&words).context("the words in the encrypted seed are not right")?, Kept::Sealed))
}

fn open(seed: &Secret, text: &str, passphrase: &str) -> anyhow::Result<Zeroizing<String>> {
    sealed::open(text, passphrase).map_err(|error| {
        let hint = match error {
            OpenError::WrongPassphrase => {
                "type it again; without it only the words on paper help (satgrid init --restore)"
            }
            OpenError::TooMuchWork { .. } | OpenError::Malformed(_) | OpenError::Damaged => {
                "put back what `satgrid wallet encrypt` wrote, or restore from paper (satgrid init --restore)"
            }
        };
        let error = anyhow::Error::new(error).context(format!("{seed} is not opened"));
        match Err::<(), _>(error).hint(hint) {
            Err(error) => error,
            Ok(()) => unreachable!("an error stays one"),
        }
    })
}

/// The passphrase of this node's seed.
fn passphrase(place: Option<&Secret>) -> anyhow::Result<Zeroizing<String>> {
    if let Some(typed) = TYPED.get() {
        return Ok(typed.clone());
    }
    let Some(from) = place else {
        let typed = ask("passphrase of the seed: ").hint(
            "name its place: wallet.passphrase = \"file:PATH\", \"credential:NAME\", \"env:NAME\" or \"fd:NUMBER\"",
        )?;
        return Ok(TYPED.get_or_init(|| typed).clone());
    };
    let text = Zeroizing::new(from.read().context("wallet.passphrase")?);
    Ok(match from {
        Secret::Fd(_) => TYPED.get_or_init(|| text).clone(),
        Secret::Env(_) | Secret::File(_) | Secret::Credential(_) => text,
    })
}

/// Asks on the terminal, without showing what is typed.
fn ask(prompt: &str) -> anyhow::Result<Zeroizing<String>> {
    ensure!(
        std::io::stdin().is_terminal() && std::io::stderr().is_terminal(),
        "the seed is encrypted, and there is no terminal to ask for its passphrase"
    );
    let typed = rpassword::prompt_password(prompt).context("no passphrase was typed")?;
    Ok(Zeroizing::new(typed))
}

/// A passphrase that is to be: from `from`, or typed twice.
pub(crate) fn new_passphrase(from: Option<&Secret>) -> anyhow::Result<Zeroizing<String>> {
    let passphrase = match from {
        Some(from) => Zeroizing::new(from.read().context("the new passphrase")?),
        None => {
            let typed = ask("new passphrase of the seed: ").hint("without a terminal: --passphrase-from file:PATH")?;
            ensure!(typed == ask("once more: ")?, "the two are not the same; nothing was changed");
            typed
        }
    };
    ensure!(!passphrase.is_empty(), "an empty passphrase protects nothing");
    if passphrase.chars().count() < SHORT_PASSPHRASE {
        eprintln!("warning: a short passphrase: whoever has the file can try many; a few random words are better");
    }
    Ok(passphrase)
}

/// The text of a seed file that `passphrase` opens.
pub(crate) fn sealed(phrase: &Phrase, passphrase: &str) -> anyhow::Result<String> {
    let mut random = Zeroizing::new([0; RANDOM_BYTES]);
    rand::rngs::OsRng.try_fill_bytes(random.as_mut_slice()).context("the system gives no random bytes")?;
    Ok(sealed::seal(phrase.reveal(), passphrase, if cfg!(test) { QUICK } else { WORK }, &random)?)
}

/// Keeps the seed under a (new) passphrase. Returns how it was kept before.
pub(crate) fn encrypt(config: &Config, from: Option<&Secret>) -> anyhow::Result<(PathBuf, Kept)> {
    let path = file(config)?;
    let (phrase, kept) = read(config)?;
    let text = sealed(&phrase, &new_passphrase(from)?)?;
    replace(&path, &text)?;
    Ok((path, kept))
}

/// Keeps the seed as plain words.
pub(crate) fn decrypt(config: &Config) -> anyhow::Result<PathBuf> {
    let path = file(config)?;
    let (phrase, kept) = read(config)?;
    ensure!(kept == Kept::Sealed, "{} is not encrypted", path.display());
    replace(&path, &format!("{}\n", phrase.reveal()))?;
    Ok(path)
}

fn file(config: &Config) -> anyhow::Result<PathBuf> {
    match &config.wallet.seed {
        Secret::File(path) => Ok(path.clone()),
        other @ (Secret::Env(_) | Secret::Credential(_) | Secret::Fd(_)) => {
            bail!("wallet.seed is {other}: only a file of this node's can be encrypted or decrypted")
        }
    }
}

/// Puts `text` in the place of a secret file as a whole, and writes over what was there.
fn replace(path: &Path, text: &str) -> anyhow::Result<()> {
    let mut new = path.to_owned().into_os_string();
    new.push(".new");
    let new = PathBuf::from(new);
    let write = || -> std::io::Result<()> {
        let mut old = OpenOptions::new().read(true).write(true).open(path)?;
        let length = old.metadata()?.len();
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()?;
        // The name is the new file's; these are the blocks that had the words.
        old.seek(SeekFrom::Start(0))?;
        old.write_all(&vec![0; usize::try_from(length).unwrap_or_default()])?;
        old.sync_all()
    };
    write().with_context(|| format!("cannot replace {}", path.display()))
}

/// What has to be said to this program when it starts anew in the same process: the passphrase, in a pipe of its own.
pub(crate) fn taken_along() -> anyhow::Result<Option<(OwnedFd, String)>> {
    let Some(typed) = TYPED.get() else { return Ok(None) };
    let (reader, mut writer) = std::io::pipe().context("no pipe for the passphrase")?;
    // A pipe holds more than any passphrase: this does not wait for a reader.
    writer.write_all(typed.as_bytes()).context("the passphrase cannot be handed on")?;
    let reader = OwnedFd::from(reader);
    rustix::io::fcntl_setfd(&reader, rustix::io::FdFlags::empty())?;
    let place = format!("wallet.passphrase=fd:{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
    Ok(Some((reader, place)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{self, Overrides};
    use std::collections::BTreeMap;
    use std::os::unix::fs::PermissionsExt;

    fn secret_file(path: &Path, text: &str) -> Secret {
        std::fs::write(path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
        Secret::File(path.to_owned())
    }

    /// A node's folder with these words, and what `wallet.passphrase` says.
    fn node(dir: &Path, words: &str, passphrase: Option<&Secret>) -> Config {
        secret_file(&dir.join("seed"), words);
        config_of(dir, passphrase)
    }

    fn config_of(dir: &Path, passphrase: Option<&Secret>) -> Config {
        let mut overrides = Overrides::default();
        overrides.set("--dir", "node.dir", Some(dir.display()));
        overrides.set("--set", "wallet.passphrase", passphrase);
        let nowhere = BTreeMap::from([("HOME".to_owned(), dir.display().to_string())]);
        config::load(&overrides, &nowhere).unwrap().config
    }

    fn words() -> String {
        format!("{}about\n", "abandon ".repeat(11))
    }

    #[test]
    fn no_plain_words_are_left_once_it_is_encrypted() {
        let dir = tempfile::tempdir().unwrap();
        let first = secret_file(&dir.path().join("first"), "correct horse battery\n");
        let plain = node(dir.path(), &words(), None);
        let seed = dir.path().join("seed");
        assert_eq!(read(&plain).unwrap().1, Kept::Plain);
        // Another name of the old blocks: what an undelete would find.
        std::fs::hard_link(&seed, dir.path().join("blocks")).unwrap();
        encrypt(&plain, Some(&first)).unwrap();
        for entry in std::fs::read_dir(dir.path()).unwrap() {
            let bytes = std::fs::read(entry.unwrap().path()).unwrap();
            assert!(!String::from_utf8_lossy(&bytes).contains("abandon"));
        }
        assert!(!dir.path().join("seed.new").exists());
        assert_eq!(std::fs::metadata(&seed).unwrap().permissions().mode() & 0o777, 0o600);

        let sealed = config_of(dir.path(), Some(&first));
        let (phrase, kept) = read(&sealed).unwrap();
        assert_eq!((phrase.reveal(), kept), (words().trim(), Kept::Sealed));
        // Another passphrase, and then none.
        let second = secret_file(&dir.path().join("second"), "staple");
        encrypt(&sealed, Some(&second)).unwrap();
        let error = format!("{:#}", read(&sealed).unwrap_err());
        assert!(error.contains("passphrase is wrong"), "{error}");
        let sealed = config_of(dir.path(), Some(&second));
        decrypt(&sealed).unwrap();
        assert_eq!(std::fs::read_to_string(&seed).unwrap(), words());
        assert!(decrypt(&sealed).unwrap_err().to_string().contains("not encrypted"));
    }

    #[test]
    fn nothing_is_changed_where_it_cannot_be_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let empty = secret_file(&dir.path().join("empty"), "\n");
        let plain = node(dir.path(), &words(), None);
        assert!(encrypt(&plain, Some(&empty)).is_err());
        assert!(encrypt(&plain, Some(&Secret::File(dir.path().join("none")))).is_err());
        assert_eq!(std::fs::read_to_string(dir.path().join("seed")).unwrap(), words());
        // Words that are not right are not sealed away.
        let wrong = node(dir.path(), "abandon ability", None);
        assert!(encrypt(&wrong, Some(&secret_file(&dir.path().join("p"), "long enough a one"))).is_err());
    }
}
