package command

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"

	"github.com/ownllm/ownllm/internal/adminapi"
	"github.com/ownllm/ownllm/internal/secret"
)

// AdminOptions are embedded by every command that speaks to the admin API.
type AdminOptions struct {
	Server         string `placeholder:"URL" help:"Address of the edge; without it, that of a running ownllm up is taken from its ready.json."`
	AdminTokenFile string `placeholder:"FILE" help:"File with the admin token, - for standard input; or give the token itself in $$OWNLLM_ADMIN_TOKEN."`
	DataOptions
}

// client finds the edge and returns a client for it, which is to be closed.
func (o AdminOptions) client(env *Environment) (*adminapi.Client, error) {
	token, err := env.secret("OWNLLM_ADMIN_TOKEN", o.AdminTokenFile)
	if err != nil {
		return nil, err
	}
	server := o.Server
	if server == "" {
		ready, err := o.ready(env)
		if err != nil {
			return nil, err
		}
		server = ready.AdminURL
		if token == "" {
			token = secret.String(ready.AdminToken)
		}
	}
	if token == "" {
		return nil, usageError{errors.New("no admin token: set OWNLLM_ADMIN_TOKEN, or name a file that holds it by --admin-token-file")}
	}
	client, err := adminapi.NewClient(server, token)
	if err != nil {
		return nil, usageError{err}
	}
	return client, nil
}

// ready reads the ready.json of a running `ownllm up`.
func (o AdminOptions) ready(env *Environment) (adminapi.Ready, error) {
	dir, err := o.dir(env)
	if err != nil {
		return adminapi.Ready{}, err
	}
	ready, err := adminapi.ReadReady(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return ready, unreachableError{fmt.Errorf("no running OwnLLM found: there is no %s\n"+
			"Start one with `ownllm up`, or name a running edge by --server and OWNLLM_ADMIN_TOKEN.",
			filepath.Join(dir, adminapi.ReadyFile))}
	}
	return ready, err
}

// one asks the edge for one object and prints it: as JSON, or by show.
func one[T any](env *Environment, admin AdminOptions, output Output, ask func(*adminapi.Client) (T, error), show func(io.Writer, ...T) error) error {
	api, err := admin.client(env)
	if err != nil {
		return err
	}
	defer api.Close()
	object, err := ask(api)
	if err != nil {
		return err
	}
	return output.print(env, object, func(w io.Writer) error { return show(w, object) })
}

// many asks the edge for a list and prints it: as JSON, or by show.
func many[T any](env *Environment, admin AdminOptions, output Output, ask func(*adminapi.Client) ([]T, error), show func(io.Writer, ...T) error) error {
	api, err := admin.client(env)
	if err != nil {
		return err
	}
	defer api.Close()
	objects, err := ask(api)
	if err != nil {
		return err
	}
	list := struct {
		Data []T `json:"data"`
	}{objects}
	return output.print(env, list, func(w io.Writer) error { return show(w, objects...) })
}
