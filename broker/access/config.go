package access

import (
	"crypto/sha256"
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nkeys"

	"github.com/ownllm/ownllm/broker/bus"
)

// Accounts is the part of a nats-server's configuration that makes the accounts. The
// embedded server has it too.
func Accounts(token string) string {
	var b strings.Builder
	fmt.Fprintf(&b, "system_account: %s\naccounts {\n", AccountSystem)
	fmt.Fprintf(&b, `  %s {
    jetstream: enabled
    users: [{user: %q, password: %s}]
    # One export for all that is imported below: so no answer can lead from one import
    # into another.
    exports: [{service: ">", accounts: [%s]}]
  }
`, AccountCore, bus.UserCore, strconv.Quote(token), AccountAgents)
	fmt.Fprintf(&b, `  %s {
    users: [{user: %q, password: %s}]
    imports: [
`, AccountAgents, bus.UserAgents, strconv.Quote(token))
	for _, subject := range imports() {
		fmt.Fprintf(&b, "      {service: {account: %s, subject: %q}}\n", AccountCore, subject)
	}
	fmt.Fprintf(&b, `    ]
  }
  %s {
    users: [{user: %q, password: %s}]
  }
  %s {
    users: [{user: %q, password: %s}]
  }
}
`, AccountIngress, bus.UserIngress, strconv.Quote(token), AccountSystem, bus.UserSystem, strconv.Quote(token))
	return b.String()
}

// ServerConfig is the configuration of a nats-server whose system users have the token
// as their password, and whose other users a Callout lets in. Addresses, TLS, the folder
// of JetStream and routes are for whoever runs it, in the file that includes this one or
// by flags. With always, JetStream has what it stores on the disk before it says so.
func ServerConfig(token string, always bool) (string, error) {
	key, err := issuer(token)
	if err != nil {
		return "", err
	}
	public, err := key.PublicKey()
	if err != nil {
		return "", fmt.Errorf("key of the auth callout: %w", err)
	}
	flushing := ""
	if always {
		flushing = "  # What is acknowledged is on the disk.\n  sync_interval: always\n"
	}
	users := []string{bus.UserCore, bus.UserAgents, bus.UserIngress, bus.UserSystem}
	return fmt.Sprintf(`# Made by "ownllm nats-config". It holds a secret: whoever reads it can do everything.
%s
authorization {
  timeout: %d
  auth_callout {
    issuer: %s
    account: %s
    auth_users: [%s]
  }
}

# A black-holed connection is noticed within about three seconds.
ping_interval: "1s"
ping_max: 2

jetstream {
  # The default of 1,000 consumers for a stream is a few hundred agents.
  limits { default_max_consumers: -1 }
%s}
`, Accounts(token), int(AuthTimeout.Seconds()), public, AccountSystem, strings.Join(users, ", "), flushing), nil
}

// issuer is the key by which a Callout signs what it says. A nats-server knows its public
// half.
func issuer(token string) (nkeys.KeyPair, error) {
	seed := sha256.Sum256([]byte("ownllm auth callout issuer\x00" + token))
	raw, err := nkeys.EncodeSeed(nkeys.PrefixByteAccount, seed[:])
	if err != nil {
		return nil, fmt.Errorf("key of the auth callout: %w", err)
	}
	key, err := nkeys.FromSeed(raw)
	if err != nil {
		return nil, fmt.Errorf("key of the auth callout: %w", err)
	}
	return key, nil
}
